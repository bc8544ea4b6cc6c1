"""Write the report page of a run: `python launch/report.py --run runs/demo`."""

from dataclasses import MISSING, dataclass

import click

from data.errors import UserError
from eval.report.faults import fault_lines
from eval.report.figures import learning_curve_png
from eval.report.page import written_report
from launch.options import command, option


@dataclass(frozen=True)
class ReportConfig:
    run: str = option(
        MISSING,
        "Run folder, for example runs/demo. The page shows what the folder holds of eval/{base,sft,grpo}/{test,unseen,cells} "
        "(or, of one file, eval/{base,sft,grpo}), puzzles/{test,unseen,cells}.parquet, sft/, grpo/ and summary.json.",
    )
    show: int = option(3, "Number of best and of worst puzzles that the page shows.")
    png: str | None = option(None, "Also draw the learning curve into this .png file.")


@command(ReportConfig)
def main(config: ReportConfig) -> None:
    """Write RUN/report.html, a page that opens in any browser, also offline, and say what is wrong with the answers."""
    if config.show < 0:
        raise UserError(f"--show {config.show}: give 0 or more")
    path, evaluations = written_report(config.run, config.show)
    for line in fault_lines(evaluations):
        click.echo(line)
    click.echo(f"wrote {path}")
    if config.png is not None:
        click.echo(f"wrote {learning_curve_png(config.run, config.png)}")


if __name__ == "__main__":
    main()
