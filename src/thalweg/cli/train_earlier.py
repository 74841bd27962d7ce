"""What earlier commands left in the folder of `thalweg train`: seeds of the same training, and whose reports."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from thalweg.cli.endpoints import Endpoint, Endpoints
from thalweg.cli.parts import Value
from thalweg.errors import ConfigError

RECORD = "train.json"
REPORT = "report.html"

_SEED = re.compile(r"seed-(\d{1,18})\.safetensors")


def others(endpoints: Endpoints, plan: Sequence[Endpoint]) -> list[Endpoint]:
    """Find the seeds of this training that lie in the folder beside those that were asked for.

    Args:
        endpoints: the training.
        plan: what was asked for.
    """
    names = (_SEED.fullmatch(file.name) for file in endpoints.out.glob("seed-*.safetensors"))
    asked = {endpoint.seed for endpoint in plan}
    found = [endpoints.found(seed) for seed in sorted({int(name[1]) for name in names if name} - asked)]
    return [endpoint for endpoint in found if endpoint.record is not None]


def require_own_reports(endpoints: Endpoints, plan: Sequence[Endpoint]) -> None:
    """See that the reports in the folder are those of this training, which may be written anew.

    Args:
        endpoints: the training.
        plan: what was asked for.

    Raises:
        ConfigError: they are of another training or of another command.
    """
    from thalweg.cli.train_page import is_page

    record, report = endpoints.out / RECORD, endpoints.out / REPORT
    if record.exists() and not _is_of(_rows(record), endpoints, plan):
        raise ConfigError(
            f"Expected no results of another training in {endpoints.out}. Got {record}. "
            "Choose another --out, or overwrite it with --force."
        )
    if report.exists() and not (record.exists() and is_page(report)):
        raise ConfigError(
            f"Expected no report of another command in {endpoints.out}. Got {report}. "
            "Choose another --out, or overwrite it with --force."
        )


def _rows(file: Path) -> list[Value]:
    """Read the seeds that an earlier command tells of; none where it is not this command's."""
    try:
        found = json.loads(file.read_bytes())["seeds"]
        return [{"seed": int(row["seed"]), "identity": str(row["identity"])} for row in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_of(rows: Sequence[Value], endpoints: Endpoints, plan: Sequence[Endpoint]) -> bool:
    """Say whether the first seed would be what it was."""
    if not rows:
        return False
    seed = rows[0]["seed"]
    endpoint = next((one for one in plan if one.seed == seed), None) or endpoints.found(seed)
    return bool(endpoint.identity == rows[0]["identity"])
