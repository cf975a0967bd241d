"""Send the deployments, their work pool and their automations to a Prefect API: `make deploy`.

The API is the one that PREFECT_API_URL (or the active Prefect profile) names. Run it again after any change of
infra/prefect.yaml, infra/automations.yaml, infra/alerts.yaml or CLEAR_ALERTS: what is there is updated, nothing is
doubled.
"""

import subprocess
import sys
from pathlib import Path

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from clear.data.ports import spare_loopback
from clear.errors import ClearError, fail
from flows.service.alerts import ensure_alerts
from flows.service.automations import ensure_automation

POOL = "clear"
DEPLOYMENTS = Path("infra/prefect.yaml")
AUTOMATIONS = Path("infra/automations.yaml")


def deploy(root: Path) -> str:
    """Create or update everything for the project in `root`; returns a line about its alerts.

    Raises ClearError where no API is named, it does not answer, it refuses a deployment, or a target of the alerts is
    wrong; everything else is deployed in the last case.
    """
    url = get_current_settings().api.url
    if not url:
        raise ClearError(
            "PREFECT_API_URL is not set; name a Prefect API with it, or start one with `make prefect-local`."
        )
    with get_client(sync_client=True) as client:
        if problem := client.api_healthcheck():
            raise ClearError(f"the Prefect API at {url} does not answer ({problem}); start it, or set PREFECT_API_URL.")
        ensure_pool(client)
        send_deployments(root)
        for content in yaml.safe_load((root / AUTOMATIONS).read_text()):
            ensure_automation(client, AutomationCore.model_validate(content))
        return ensure_alerts(client, root)


def ensure_pool(client: SyncPrefectClient) -> None:
    """Create the work pool of local processes if it is not there; an existing one is left as it was set up."""
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def send_deployments(root: Path) -> None:
    """Let Prefect's own command read infra/prefect.yaml."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise ClearError(f"{root / DEPLOYMENTS}: `prefect deploy` refused it: {said}")


def main() -> int:
    """Deploy from the working directory; 0 done, 1 refused with one line."""
    spare_loopback()
    try:
        alerts = deploy(Path.cwd())
    except ClearError as error:
        return fail(error)
    names = [deployment["name"] for deployment in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]]
    print(f"Deployed {', '.join(names)}. Start a worker where the data is: prefect worker start --pool {POOL}")
    print(alerts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
