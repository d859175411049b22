"""``batchrun doctor``"""

from __future__ import annotations

import click

from batchrun.cli.options import debug_option, echo_json, json_option


@click.command(epilog="Example: batchrun doctor s3://my-bucket/somewhere")
@click.argument("url", metavar="[OUTPUT]", required=False)
@click.option("--start-ray", is_flag=True, help="Also start a Ray here and stop it again.")
@json_option
@debug_option
def command(url: str | None, start_ray: bool, as_json: bool) -> int:
    """Check this machine: each thing a run needs is ok, missing, or failed, and what to do.

    With OUTPUT also tries a write there. Exit code 0 unless something essential failed.
    """
    from batchrun.cluster.checks import CheckState, run_checks

    marks = {CheckState.OK: "ok", CheckState.MISSING: "missing", CheckState.FAILED: "FAILED"}
    checks = []
    for check in run_checks(url, start_ray=start_ray):
        checks.append(check)
        if not as_json:
            click.echo(f"{marks[check.state]:8} {check.name}: {check.found}")
            if check.advice:
                click.echo(f"         {check.advice}")
    failed = any(check.state is CheckState.FAILED for check in checks)
    if as_json:
        echo_json(
            {
                "ok": not failed,
                "checks": [
                    {
                        "name": check.name,
                        "state": check.state.value,
                        "found": check.found,
                        "advice": check.advice,
                    }
                    for check in checks
                ],
            }
        )
    return 1 if failed else 0
