"""Text process: encodes prompts and decodes outputs for an API server.

It keeps no state that the API server cannot send again; see `hbserve.frontend.text_process`. Threads handle long texts
and grammars; the event loop handles all other requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import msgspec
import zmq

from hbserve.config import Config
from hbserve.errors import InvalidRequestError
from hbserve.messages.text import (
    Checked,
    CheckGrammar,
    CloseText,
    EncodeChat,
    Encoded,
    EncodeText,
    FeedText,
    OpenText,
    StreamText,
    TextFailed,
    TextReply,
    TextRequest,
)
from hbserve.process import child, event_loop
from hbserve.rpc.async_socket import AsyncSocket
from hbserve.tokenizer import Tokenizer, leave_out_torch
from hbserve.tokenizer.chat_template import MAX_AT_ONCE
from hbserve.tokenizer.text_service import LONG_TEXT, TextDecoding, in_grammar_thread

logger = logging.getLogger(__name__)

_MAX_TEMPLATES = 4 * MAX_AT_ONCE
"""Requests with a template of their own, waiting ones included: the last must be answered before the API server gives
up the process."""


class TextWorker:
    """Worker that answers requests, in batches, on one socket.

    Args:
        address: address on which the API server listens.
    """

    def __init__(self, tokenizer: Tokenizer, address: str) -> None:
        self._tokenizer = tokenizer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = AsyncSocket(self._context.socket(zmq.DEALER))
        self._socket.socket.linger = 0  # at the end the process does not wait for an API server that has ended
        self._socket.socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[TextRequest])
        self._streams: dict[int, TextDecoding] = {}
        self._replies: list[TextReply] = []
        self._tasks: set[asyncio.Task[None]] = set()
        # Threads of their own: such a template may take seconds, and long texts must not wait for it.
        self._template_threads = ThreadPoolExecutor(MAX_AT_ONCE, "template")
        self._num_templates = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        self._socket.send([self._encoder.encode(self._replies)])  # a greeting: the connection works
        while True:
            (payload,) = await self._socket.receive()
            for request in self._decoder.decode(payload):
                self._handle(request)
            self._flush()
            await asyncio.sleep(0)

    def _handle(self, request: TextRequest) -> None:
        if isinstance(request, FeedText):
            self._feed(request)
        elif isinstance(request, OpenText):
            decoding = self._streams[request.stream] = TextDecoding(self._tokenizer, request.options)
            decoding.feed(request.token_ids, len(request.token_ids), False)
        elif isinstance(request, CloseText):
            self._streams.pop(request.stream, None)
        elif _has_template(request) and self._num_templates >= _MAX_TEMPLATES:
            error = "too many requests with a chat_template of their own are open; send it again later"
            self._replies.append(TextFailed(query_id=request.query_id, error=error, param="chat_template"))
        elif _size(request) < LONG_TEXT and not isinstance(request, CheckGrammar) and not _has_template(request):
            self._replies.append(self._reply_to(request))
        else:  # in a thread, so that other requests do not wait for it
            self._num_templates += _has_template(request)
            task = asyncio.create_task(self._answer_later(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _feed(self, request: FeedText) -> None:
        decoding = self._streams.get(request.stream)
        if decoding is None:
            return  # the stream has ended
        output = decoding.feed(request.token_ids, request.shown, request.last)
        if request.last or output.stop_string is not None:
            del self._streams[request.stream]
        self._replies.append(StreamText(stream=request.stream, output=output))

    async def _answer_later(self, request: EncodeText | EncodeChat | CheckGrammar) -> None:
        if isinstance(request, CheckGrammar):
            reply = await in_grammar_thread(lambda: self._reply_to(request))
        elif _has_template(request):
            loop = asyncio.get_running_loop()
            reply = await loop.run_in_executor(self._template_threads, self._reply_to, request)
            self._num_templates -= 1
        else:
            reply = await asyncio.to_thread(self._reply_to, request)
        self._replies.append(reply)
        self._flush()

    def _reply_to(self, request: EncodeText | EncodeChat | CheckGrammar) -> TextReply:
        number = request.query_id
        try:
            if isinstance(request, EncodeText):
                ids = self._tokenizer.encode(request.text, add_special_tokens=request.add_special_tokens)
                return Encoded(query_id=number, token_ids=ids)
            if isinstance(request, EncodeChat):
                ids = self._tokenizer.encode_chat(request.messages, request.tools, request.options)
                return Encoded(query_id=number, token_ids=ids)
            vocabulary = self._tokenizer.vocabulary(request.vocab_size)
            if request.token_ids is None:
                return Checked(query_id=number, grammar=vocabulary.check(request.grammar))
            return Checked(query_id=number, problem=vocabulary.problem_of(request.grammar, request.token_ids))
        except InvalidRequestError as error:
            return TextFailed(query_id=number, error=str(error), param=error.param)
        except Exception:  # concerns one request; the process must serve the others
            logger.exception("bug while encoding or checking")
            error_text = f"the {type(request).__name__} failed; see the server's log"
            return TextFailed(query_id=number, error=error_text, param=None, is_bug=True)

    def _flush(self) -> None:
        if self._replies:
            self._socket.send([self._encoder.encode(self._replies)])
            self._replies.clear()


def _has_template(request: TextRequest) -> bool:
    """Return whether the request brings a chat template that its client wrote."""
    return isinstance(request, EncodeChat) and request.options.template is not None


def _size(request: EncodeText | EncodeChat | CheckGrammar) -> int:
    """Return the approximate number of characters."""
    if isinstance(request, EncodeText):
        return len(request.text)
    if isinstance(request, EncodeChat):
        return sum(len(str(message.get("content", ""))) for message in request.messages)
    return len(request.grammar)


def main() -> None:
    """Entry point of the process that the API server starts."""
    orders = child.read_orders()
    config = msgspec.convert(orders["config"], Config)
    child.set_process_title(f"hbserve-{orders['name']}")
    child.configure_logging(config.logging, orders["name"])
    leave_out_torch()
    child.exit_after(lambda: event_loop.run(_serve(config, orders["address"])))


async def _serve(config: Config, address: str) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is for the API server
    child.watch_parent(lambda: os._exit(1))
    worker = TextWorker(Tokenizer(config.tokenizer_path, config.model.path), address)
    serving = asyncio.create_task(worker.run())
    stopped = asyncio.create_task(stop.wait())
    child.freeze_heap()
    child.report_status({"ready": True})
    done, _ = await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if serving in done:
        serving.result()
    return 0


if __name__ == "__main__":
    main()
