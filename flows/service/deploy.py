"""Send the deployments, their work pool and their automation to a Prefect API: `make deploy`.

The API is the one that PREFECT_API_URL (or the active Prefect profile) names. Run it again after any change of
infra/prefect.yaml or infra/automations.yaml: what is there is updated, nothing is doubled.
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

POOL = "clear"
DEPLOYMENTS = Path("infra/prefect.yaml")
AUTOMATIONS = Path("infra/automations.yaml")


def deploy(root: Path) -> None:
    """Create or update everything for the project in `root`.

    Raises ClearError where no API is named, it does not answer, or it refuses a deployment.
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


def ensure_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Create the automation, or bring the one of that name up to date."""
    there = client.read_automations_by_name(automation.name)
    if there:
        client.update_automation(there[0].id, automation)
    else:
        client.create_automation(automation)


def main() -> int:
    """Deploy from the working directory; 0 done, 1 refused with one line."""
    spare_loopback()
    try:
        deploy(Path.cwd())
    except ClearError as error:
        return fail(error)
    names = [deployment["name"] for deployment in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]]
    print(f"Deployed {', '.join(names)}. Start a worker where the data is: prefect worker start --pool {POOL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
