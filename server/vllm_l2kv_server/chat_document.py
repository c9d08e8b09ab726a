"""Where the document of a chat ends: `kv_prefix_messages` becomes `kv_prefix_tokens`.

vLLM renders every chat with one method of its renderer, whichever endpoint it came to. The messages of the document are
rendered by the same method with the same arguments. If their tokens begin the whole prompt, their number is where the
document ends. A template need not work that way: it may drop parts of earlier turns, or refuse some messages alone.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import has_non_text_content

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import PREFIX_MESSAGES, PREFIX_TOKENS
from vllm_l2kv_server.context import ChatDocument, current

NAME = PREFIX_MESSAGES.name
INSTEAD = f"give {PREFIX_TOKENS.name} instead"
MAX_KNOWN = 1024
"""Documents that are remembered; some 100 bytes each."""
WITHOUT_ANSWER = {"add_generation_prompt": False, "continue_final_message": False}


class TokenizedDocument(NamedTuple):
    """What is remembered of a document: enough to recognize its tokens, not the tokens.

    Attributes:
        num_tokens: Their number.
        digest: Of their ids.
    """

    num_tokens: int
    digest: bytes

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Self:
        """Returns what is remembered of these token ids."""
        return cls(len(tokens), hashlib.sha256(array("q", tokens)).digest())

    def begins(self, whole: Sequence[int]) -> bool:
        """Whether a prompt begins with its tokens."""
        return self.num_tokens > 0 and self == self.of(whole[: self.num_tokens])


class DocumentFinder:
    """Notes on each rendered chat where its document ends, if its request has one.

    An error is noted too. It is raised when the prompt goes to the engine, since vLLM also renders chats of its own.
    Documents are remembered, since each is asked about many times, and to tokenize a long one takes longer than to find
    its rows.

    Args:
        render_chat_async: The method of vLLM's renderer.
    """

    def __init__(self, render_chat_async: Any) -> None:
        self._render = render_chat_async
        self._known: dict[bytes, TokenizedDocument] = {}  # the one that was asked for last is the last

    async def render(self, conversations: Sequence[Any], chat_params: Any, tok_params: Any, **others: Any) -> Any:
        """Returns what vLLM's method does: the conversations, and the prompts for the engine."""
        rendered = await self._render(conversations, chat_params, tok_params, **others)
        compression = current.get()
        if compression is None or compression.document is None:
            return rendered
        template_kwargs = {**chat_params.chat_template_kwargs, **WITHOUT_ANSWER}
        without_answer = (
            replace(chat_params, chat_template_kwargs=template_kwargs),
            replace(tok_params, max_output_tokens=0),
        )
        for messages, prompt in zip(conversations, rendered[1], strict=True):
            try:
                beginning = _messages_of(compression.document, messages)
                whole = prompt.get("prompt_token_ids") or []
                document = await self._tokenized(beginning, whole, *without_answer, **others)
                prompt[PREFIX_TOKENS.name] = _checked_end(beginning, document, whole)
            except ParamError as error:
                prompt[PREFIX_TOKENS.name] = error
        return rendered

    async def _tokenized(
        self, beginning: list[Any], whole: Sequence[int], *params: Any, **others: Any
    ) -> TokenizedDocument:
        """Renders the messages of a document alone, unless it is known as the beginning of a whole prompt.

        A template may write the date, so a document that was known may have other tokens now.

        Raises:
            ParamError: The chat template refuses them.
        """
        # With all arguments, so that a request with another `cache_salt` cannot tell by the time whether it was known.
        key = hashlib.sha256(repr((beginning, params, others)).encode("utf-8", "backslashreplace")).digest()
        document = self._known.pop(key, None)
        if document is None or not document.begins(whole):
            try:
                _, (prompt,) = await self._render([beginning], *params, **others)
            except VLLMValidationError as error:
                raise ParamError(
                    NAME,
                    f"{NAME} does not work here: the chat template refuses the first {len(beginning)} messages alone "
                    f"({error.args[0]}); {INSTEAD}, or let the document end with a later message.",
                ) from error
            document = TokenizedDocument.of(prompt.get("prompt_token_ids") or [])
        self._known[key] = document
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return document


def find_documents(renderer: Any) -> None:
    """Lets vLLM's renderer, the one object that all endpoints share, note where documents end."""
    renderer.render_chat_async = DocumentFinder(renderer.render_chat_async).render


def end_of_document(prompt: Any) -> int:
    """Returns the number of tokens up to the end of the document.

    Args:
        prompt: A prompt as it goes to the engine, of a request with `kv_prefix_messages`.

    Raises:
        ParamError: The chat template does not allow that message, or the prompt is not a chat rendered by a template.
    """
    end = prompt.get(PREFIX_TOKENS.name) if isinstance(prompt, dict) else None
    if isinstance(end, int):
        return end
    raise end or ParamError(NAME, f"{NAME} needs a chat that vLLM renders by a chat template; {INSTEAD}.")


def _messages_of(document: ChatDocument, messages: Sequence[Any]) -> list[Any]:
    """Returns the messages of the document.

    Raises:
        ParamError: They are not known, or hold more than text.
    """
    last, given = document.num_messages, document.num_given
    if given is not None and given != len(messages):
        raise ParamError(
            NAME,
            f"{NAME} does not work here: of the {given} messages of this request, the system's counted, vLLM makes a "
            f"chat of {len(messages)}; {INSTEAD}.",
        )
    if last > len(messages):
        raise ParamError(NAME, f"{NAME} must be at most {len(messages)}, the number of messages, got {last}.")
    beginning = list(messages[:last])
    if has_non_text_content(beginning):
        raise ParamError(NAME, f"{NAME} counts text only, and the first {last} messages hold more; {INSTEAD}.")
    return beginning


def _checked_end(beginning: Sequence[Any], document: TokenizedDocument, whole: Sequence[int]) -> int:
    """Returns the document's number of tokens.

    Raises:
        ParamError: They are no strict beginning of the whole prompt's.
    """
    if not document.begins(whole):
        raise ParamError(
            NAME,
            f"{NAME} does not work here: alone, the first {len(beginning)} messages become other tokens than at the "
            f"beginning of this prompt, by the chat template or the tokenizer; {INSTEAD}, or let the document end with "
            "another message.",
        )
    if document.num_tokens == len(whole):
        raise ParamError(
            NAME, f"{NAME} names the whole prompt, and at least one token must follow the document; add a message."
        )
    return document.num_tokens
