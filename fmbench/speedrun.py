"""Renders the speed records: results/speedrun.md, and the table at the top of the README.

python -m fmbench.speedrun                        write them
python -m fmbench.speedrun --check                fail if they are not what the records say
python -m fmbench.speedrun --seeds=speedrun:94    the seeds that a record of this config is to have, by the rule
"""

from fmbench import config, entries
from fmbench.pages import generated, speedrun
from fmbench.system.command_line import Parser, plain_errors


@plain_errors("speedrun")
def main() -> None:
    parser = Parser("speedrun", description=__doc__)
    generated.add_flags(parser)
    parser.add_argument("--seeds", metavar="CONFIG", help="print the seeds of a record of CONFIG, and stop")
    arguments = parser.parse_args()
    if arguments.seeds is not None:
        recipe = config.to_json(entries.resolve(arguments.seeds, {}))
        print(*speedrun.rule_seeds(recipe), sep=",")
        return
    generated.write_or_check("speedrun", speedrun.files, arguments.results_dir, check=arguments.check)


if __name__ == "__main__":
    main()
