from collections.abc import Iterator
from pathlib import Path

from otel_pg_exporter.config import SDK_PREFIX, ExporterSettings, settings_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "sdk.md"


def table() -> Iterator[str]:
    yield "| argument | environment variable | default | meaning |"
    yield "|---|---|---|---|"
    for setting in settings_of(ExporterSettings):
        default = setting.default
        if isinstance(default, float) and default == int(default):
            default = int(default)
        shown = f"`{default}`" if default not in ("", ()) else ""
        yield f"| `{setting.name}` | `{SDK_PREFIX}{setting.name.upper()}` | {shown} | {setting.help} |"


def test_the_documentation_lists_the_settings_that_the_code_has() -> None:
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition("equal to the code -->\n")
    documented, _, _ = rest.partition("<!-- end of settings -->")
    assert documented.splitlines() == list(table())
