"""A page in the browser: a prompt in, images out, and nothing leaves the machine.

The page enforces its limits only in the browser, so every value is checked here again. User text is
never rendered as HTML or Markdown.
"""

import argparse
import errno
import importlib.util
import logging
import math
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dalle_mini_impl.cli.arguments import OneLineParser, add_native, user_text
from dalle_mini_impl.cli.main import COMMANDS
from dalle_mini_impl.errors import UserError

if TYPE_CHECKING:
    from dalle_mini_impl.pipeline import TextToImagePipeline

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "checkpoints/emoji-64"
MAX_PROMPT_LENGTH = 500  # characters
MAX_PORT = 2**16 - 1
MAX_SEED = 2**53 - 1  # the largest whole number that JavaScript holds exactly
NUM_NEW_SEEDS = 1_000_000  # short enough to be told to someone else
MAX_WAITING = 16  # requests in the queue; further ones are refused
CALLS_KEPT = 64  # whose images can still be downloaded
LIMITS = {
    "num_images": (1, 16),
    "seed": (0, MAX_SEED),
    "guidance_scale": (0.0, 20.0),
    "temperature": (0.05, 5.0),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=COMMANDS["app"])
    add = parser.add_argument
    add(
        "--model",
        type=user_text,
        default=DEFAULT_MODEL,
        help="model folder; default: %(default)s",
    )
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--host", default="127.0.0.1", help="0.0.0.0 accepts other machines; default: %(default)s")
    add_native(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Serve the page."""
    options = parse(arguments)
    # An installed package has none, nor has another working folder.
    if options.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).is_dir():
        raise UserError(
            f"model: got none, and {DEFAULT_MODEL} of the repository is not here; expected "
            "--model with a folder that train_dalle.py wrote"
        )
    serve(options.model, host=options.host, port=options.port, native=options.native)


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served, before seconds are spent on loading."""
    if not 1 <= port <= MAX_PORT:
        raise UserError(f"port: got {port}, expected 1 to {MAX_PORT}")
    other_host = UserError(
        f"host: got {host!r}, expected a name or address of this machine, such as 127.0.0.1"
    )
    try:
        plain = host.strip("[]")  # of an IPv6 address in an URL
        family, *_, address = socket.getaddrinfo(plain, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (socket.gaierror, UnicodeError):  # Unicode: a name that is none of a host
        raise other_host from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise other_host from None
        raise UserError(f"port: got {port}: {error.strerror}; expected a free one") from None


class PageBackend:
    """Generates for the page, one call after the other, into folders below ``folder``."""

    def __init__(self, pipeline: "TextToImagePipeline", folder: Path, *, model: str) -> None:
        self.pipeline, self.folder, self.model = pipeline, folder, model
        self._calls: deque[Path] = deque()

    def generate(
        self, prompt: Any, num_images: Any, seed: Any, guidance_scale: Any, temperature: Any
    ) -> list[tuple[str, str]]:
        """Generate images of one prompt into files; values may be of any type.

        Returns:
            The path of each image, and a caption with prompt and seed.
        """
        from dalle_mini_impl.cli.image_files import describe_generation, save_images

        request = self.pipeline.check(
            [prompt],
            num_images=int(_number("num_images", num_images, is_whole=True)),
            seed=int(_number("seed", seed, is_whole=True)),
            guidance_scale=_number("guidance_scale", guidance_scale),
            temperature=_number("temperature", temperature),
        )
        # After the pipeline's own checks, which refuse prompts that are no text and have no length.
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise UserError(
                f"prompt: got {len(prompt)} characters, expected at most {MAX_PROMPT_LENGTH}"
            )
        files = save_images(
            self.pipeline.generate(request),
            self._new_folder(),
            numbers={prompt: 0},
            metadata=describe_generation(self.model, self.pipeline, request),
        )
        return [(file.path, f"{prompt} · seed {file.seed}") for file in files]

    def _new_folder(self) -> Path:
        # A page that is open for days must not fill the disk.
        if len(self._calls) == CALLS_KEPT:
            shutil.rmtree(self._calls.popleft(), ignore_errors=True)
        # Each call has its own: the same prompt and seed would replace files that a page still
        # shows.
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._calls.append(folder)
        return folder


def _number(name: str, value: Any, *, is_whole: bool = False) -> float | int:
    low, high = LIMITS[name]
    # Not isinstance: True is an int, and no number of images.
    is_number = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    if not is_number or (is_whole and value != int(value)):
        kind = "a whole number" if is_whole else "a number"
        raise UserError(f"{name}: got {str(value)[:40]!r}, expected {kind} from {low} to {high}")
    return int(value) if is_whole else float(value)


def build_page(backend: PageBackend) -> Any:
    """Lay out the page: Gradio's blocks, with a bounded queue."""
    import gradio as gr

    def generate(
        prompt: Any, count: Any, seed: Any, guidance: Any, temperature: Any, keep_seed: Any
    ) -> tuple[list[tuple[str, str]], list[str], Any]:
        seed = seed if keep_seed else random.randrange(NUM_NEW_SEEDS)
        try:
            images = backend.generate(prompt, count, seed, guidance, temperature)
        except UserError as error:
            # Shown on the page; a traceback in the terminal would look like a fault of the program.
            raise gr.Error(str(error), print_exception=False) from None
        return images, [path for path, _ in images], seed

    config = backend.pipeline.sampling_config
    with gr.Blocks(
        title="dalle_mini_impl", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        prompt = gr.Textbox(label="Prompt / 프롬프트", max_length=MAX_PROMPT_LENGTH, autofocus=True)
        with gr.Row():
            low, high = LIMITS["num_images"]
            count = gr.Slider(low, high, value=4, step=1, label="Images / 그림 수")
            seed = gr.Number(0, minimum=0, maximum=MAX_SEED, precision=0, label="Seed / 시드")
            keep_seed = gr.Checkbox(False, label="Keep the seed / 시드 고정")
            low, high = LIMITS["guidance_scale"]
            guidance = gr.Slider(low, high, value=config.guidance_scale, label="Guidance / 충실도")
            low, high = LIMITS["temperature"]
            temperature = gr.Slider(
                low, high, value=config.temperature, step=0.05, label="Temperature / 다양성"
            )
        button = gr.Button("Generate / 만들기", variant="primary")
        # Without Gradio's own share button, which sends the image out.
        gallery = gr.Gallery(
            label="Images / 그림",
            columns=4,
            interactive=False,
            buttons=["download", "fullscreen"],
        )
        files = gr.Files(
            label="PNG files with prompt and seed / 프롬프트와 시드가 든 PNG 파일",
            interactive=False,
        )
        inputs = [prompt, count, seed, guidance, temperature, keep_seed]
        gr.on(
            [button.click, prompt.submit],
            generate,
            inputs,
            [gallery, files, seed],
            api_name="generate",
        )
    # One call at a time: a second one would take memory and save no time.
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def serve(
    model: str, *, host: str, port: int, native: Literal["float32", "int8"] | None = None
) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    from dalle_mini_impl.cli.pipelines import open_pipeline

    check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="dalle-app-") as folder:
        # Gradio reads them when it is imported.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=f"{folder}/cache")
        # It asks for its own page once, which no proxy of the user's could fetch.
        for name in ("no_proxy", "NO_PROXY"):
            hosts = [os.environ.get(name), host, "localhost", "127.0.0.1", "::1"]
            os.environ[name] = ",".join(filter(None, hosts))
        if importlib.util.find_spec("gradio") is None:
            raise UserError("app: Gradio is missing; expected pip install -e '.[app]'")
        pipeline = open_pipeline(model, native=native)
        import gradio as gr  # takes seconds: after the model is known to load

        page = build_page(PageBackend(pipeline, Path(folder), model=model))
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            # Nothing leaves the machine: no tunnel, no monitoring, and no file larger than a byte
            # comes in.
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                theme=theme,
                footer_links=[],
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                max_file_size=1,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"port: got {port}: {error}; expected a free one") from None
        # SIGTERM ends the wait below as Ctrl-C does, so that the folder is removed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        logger.info(f"the page is at {page.local_url} ; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("stopped")
        finally:
            page.close(verbose=False)
