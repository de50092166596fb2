"""From settings to a server: find, load, compile, then answer until told to stop."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from dspark_jax.serve.build import Built, build, choose_sizes, plan, told
from dspark_jax.serve.calibrating import check_draft, prepared, prompts_of, run_calibration
from dspark_jax.serve.http.app import make_app
from dspark_jax.serve.http.listen import bind, listen
from dspark_jax.serve.http.settings import HttpSettings, ServedModel, read_keys
from dspark_jax.serve.models import Loaded, Named, find, load
from dspark_jax.serve.questions import Prompts
from dspark_jax.serve.settings import ServeSettings, Speculation
from dspark_jax.serve.terminal import answer

CACHE = "JAX_COMPILATION_CACHE_DIR"


def run(settings: ServeSettings, speculation: Speculation) -> int:
    """Serve, or answer `--prompt`; the exit code."""
    console = Console(stderr=settings.prompt is not None, highlight=False)
    if settings.prompt is not None:
        settings = replace(settings, max_num_seqs=1)
    if settings.calibrate:
        settings, speculation = prepared(settings, speculation)
    serving = settings.prompt is None and not settings.calibrate
    listening = bind(settings.host, settings.port) if serving else None
    kept = keep_compiled(settings.compilation_cache)
    named = find(
        settings.checkpoint or speculation.model,
        settings.target,
        speculation.num_speculative_tokens != 0,
    )
    calibrated = check_draft(settings, named) if settings.calibrate else None
    dtype = None if settings.dtype == "auto" else settings.dtype
    with bar(console, DownloadColumn(), TransferSpeedColumn()) as progress:
        reading = progress.add_task("reading the target")
        loaded = load(named, dtype, partial(_show, progress, reading))
    sizes = choose_sizes(settings, speculation, loaded)
    asked = None if calibrated is None else prompts_of(settings, calibrated, loaded, sizes)
    name = settings.served_model_name or str(settings.target or _name(named, loaded))
    introduce(console, name, named, loaded, plan(loaded, sizes))
    console.print(
        "compiling its programs: minutes at the first start, seconds when they are found in "
        f"{kept}",
        soft_wrap=True,
    )
    with bar(console, MofNCompleteColumn()) as progress:
        compiling = progress.add_task("compiling programs")
        show = partial(_show, progress, compiling)
        built = build(settings, speculation, loaded, sizes, name, kept, show)
    console.print(built.note, style="dim", soft_wrap=True)
    for line in told(built.seconds, sizes.page):
        console.print(line, style="dim", soft_wrap=True)
    if calibrated is not None and asked is not None:
        return calibrate_draft(settings, calibrated, built, asked, console)
    built.engine.start()
    try:
        if listening is None:
            return answer(settings, built, loaded.files.tokenizer)
        app = make_app(
            built.engine, served(settings, built, loaded, name), http(settings), built.metrics
        )
        host, port = listening.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        line = f"ready: http://{address}:{port} (a page to chat with; the API under /v1)"
        ready = partial(console.print, line, soft_wrap=True)
        return 0 if listen(app, listening, settings.shutdown_timeout, ready) else 1
    finally:
        built.engine.stop()


def calibrate_draft(
    settings: ServeSettings, folder: Path, built: Built, asked: Prompts, console: Console
) -> int:
    """`--calibrate`, under a bar; the exit code."""
    with bar(console, MofNCompleteColumn()) as progress:
        answering = progress.add_task("answering prompts")
        show = partial(_show, progress, answering)
        return run_calibration(settings, folder, built, asked, console, show)


def served(settings: ServeSettings, built: Built, loaded: Loaded, name: str) -> ServedModel:
    """What the HTTP side speaks for."""
    sizes = built.sizes
    length = settings.max_model_len or sizes.longest * sizes.page
    return ServedModel(
        name=name,
        tokenizer=loaded.files.tokenizer,
        vocab_size=sizes.vocabulary,
        max_model_len=length,
        end_tokens=loaded.files.ends,
        draft_length=sizes.verified,
    )


def http(settings: ServeSettings) -> HttpSettings:
    """Limits and doors."""
    own = () if settings.api_key is None else (settings.api_key,)
    return HttpSettings(
        api_keys=(*own, *read_keys(settings.api_key_file)),
        allowed_origins=settings.allowed_origins,
        request_timeout_seconds=settings.request_timeout,
        per_request_spec_decode_metrics=settings.per_request_spec_decode_metrics,
    )


def keep_compiled(folder: Path | None) -> Path:
    """Programs compiled once are found again at the next start, in the folder returned."""
    if folder is None and CACHE in os.environ:
        return Path(os.environ[CACHE])
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = folder or home / "dspark-jax" / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def introduce(
    console: Console, name: str, named: Named, loaded: Loaded, bytes_of: dict[str, int]
) -> None:
    """Model, draft, device and memory, before anything slow."""
    draft = "no draft: plain decoding"
    if loaded.draft_config is not None:
        config = loaded.draft_config
        draft = f"draft {named.draft}: {config.draft_length} tokens a block"
    device = jax.devices()[0]
    memory = ", ".join(f"{what} {size / 1e9:.3f} GB" for what, size in bytes_of.items())
    console.print(f"[bold]{name}[/bold] ({loaded.files.folder})")
    console.print(f"{draft}\n{device.platform} {device.device_kind}: {memory}")


def bar(console: Console, *amounts: ProgressColumn) -> Progress:
    """A progress bar that is gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _show(progress: Progress, task: object, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)  # pyright: ignore[reportArgumentType]


def _name(named: Named, loaded: Loaded) -> str:
    return named.target if isinstance(named.target, str) else loaded.files.folder.name
