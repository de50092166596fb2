"""From settings to a server: find, load, compile, then answer until told to stop."""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from socket import socket

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

from dspark_jax import ops
from dspark_jax.hosts import check_same, leading, together
from dspark_jax.serve.build import Built, build, choose_sizes, compiled, plan, told
from dspark_jax.serve.calibrating import check_draft, prepared, prompts_of, run_calibration
from dspark_jax.serve.following import Leading, followed
from dspark_jax.serve.http.app import make_app
from dspark_jax.serve.http.listen import bind, listen
from dspark_jax.serve.http.settings import HttpSettings, ServedModel, read_keys
from dspark_jax.serve.layout import described, serving_mesh
from dspark_jax.serve.lines import Line, connect
from dspark_jax.serve.models import Loaded, Named, find, load
from dspark_jax.serve.questions import Prompts
from dspark_jax.serve.settings import ServeSettings, Speculation
from dspark_jax.serve.terminal import answer

CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN = ("hosts", "host", "port", "api_key", "api_key_file", "checkpoint", "target")
OWN += ("compilation_cache", "data", "speculative_config", "model")
"""Settings that may differ between processes: doors, secrets, and where files lie."""


def run(settings: ServeSettings, speculation: Speculation) -> int:
    """Serve, or answer `--prompt`; the exit code. All processes but the first only follow."""
    console = Console(stderr=settings.prompt is not None, highlight=False, quiet=not leading())
    if settings.prompt is not None:
        settings = replace(settings, max_num_seqs=1)
    if settings.calibrate:
        settings, speculation = prepared(settings, speculation)
    check_alike(settings, speculation)
    ops.use(settings.kernels)
    mesh = serving_mesh(settings.data_parallel_size, settings.tensor_parallel_size)
    listens = settings.prompt is None and not settings.calibrate and leading()
    listening = together(lambda: bind(settings.host, settings.port) if listens else None)
    kept = keep_compiled(settings.compilation_cache)
    draft, drafted = settings.checkpoint or speculation.model, speculation.num_speculative_tokens
    named = together(lambda: find(draft, settings.target, drafted != 0))
    calibrated = together(lambda: check_draft(settings, named) if settings.calibrate else None)
    dtype = None if settings.dtype == "auto" else settings.dtype
    line = connect(settings.hosts)
    with bar(console, DownloadColumn(), TransferSpeedColumn()) as progress:
        reading = progress.add_task("reading the target")
        show = partial(_show, progress, reading)
        loaded = load(named, mesh, dtype, show, speculation.dspark_draft_topk)
    check_same(described_models(loaded))
    sizes = choose_sizes(settings, speculation, loaded)
    asked = together(lambda: calibrated and prompts_of(settings, calibrated, loaded, sizes))
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
        programs = compiled(loaded, sizes, speculation, show)
    console.print(f"kernels: {ops.told(ops.picked())}", style="dim", soft_wrap=True)
    if isinstance(line, Line):
        return followed(programs, line)
    steps = programs if line is None else Leading(programs, line)
    built = build(settings, speculation, loaded, steps, programs.count, name, kept)
    console.print(built.note, style="dim", soft_wrap=True)
    for cost in told(built.seconds, sizes.page):
        console.print(cost, style="dim", soft_wrap=True)
    if calibrated is not None and asked is not None:
        code = calibrate_draft(settings, calibrated, built, asked, console)
    else:
        code = serve(settings, built, loaded, name, listening, console)
    if code == 0 and isinstance(steps, Leading):
        steps.stop()  # after a failure the others see it end
    return code


def serve(
    settings: ServeSettings,
    built: Built,
    loaded: Loaded,
    name: str,
    listening: socket | None,
    console: Console,
) -> int:
    """Answer what is asked until there is nothing more; the exit code."""
    built.engine.start()
    try:
        if listening is None:
            return answer(settings, built, loaded.files.tokenizer)
        app = make_app(
            built.engine, served(settings, built, loaded, name), http(settings), built.metrics
        )
        host, port = listening.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        told_ready = f"ready: http://{address}:{port} (a page to chat with; the API under /v1)"
        ready = partial(console.print, told_ready, soft_wrap=True)
        return 0 if listen(app, listening, settings.shutdown_timeout, ready) else 1
    finally:
        built.engine.stop()


def check_alike(settings: ServeSettings, speculation: Speculation) -> None:
    """Raise ValueError when the processes were started to serve different things."""
    values = asdict(settings) | asdict(speculation)
    check_same({name: value for name, value in values.items() if name not in OWN})


def described_models(loaded: Loaded) -> dict[str, str]:
    """What the models' descriptions say, in a few letters each; their weights are not compared."""
    said = {"target": json.dumps(loaded.files.described, sort_keys=True)}
    said |= {"draft": repr(loaded.draft_config)}
    return {name: sha256(text.encode()).hexdigest()[:12] for name, text in said.items()}


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
    """Model, draft, mesh and memory of each device, before anything slow."""
    draft = "no draft: plain decoding"
    if loaded.draft_config is not None:
        config = loaded.draft_config
        draft = f"draft {named.draft}: {config.draft_length} tokens a block"
        if loaded.draft.candidates is not None:
            draft += f", each among {loaded.draft.candidates}"
    each = "" if loaded.mesh.size == 1 else ", each"
    memory = ", ".join(f"{what} {size / 1e9:.3f} GB" for what, size in bytes_of.items())
    console.print(f"[bold]{name}[/bold] ({loaded.files.folder})")
    console.print(f"{draft}\n{', '.join(described(loaded.mesh))}{each}: {memory}", soft_wrap=True)


def bar(console: Console, *amounts: ProgressColumn) -> Progress:
    """A progress bar that is gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _show(progress: Progress, task: object, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)  # pyright: ignore[reportArgumentType]


def _name(named: Named, loaded: Loaded) -> str:
    return named.target if isinstance(named.target, str) else loaded.files.folder.name
