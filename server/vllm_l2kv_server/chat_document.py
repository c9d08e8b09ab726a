"""Where the document of a chat ends: `kv_prefix_messages` becomes `kv_prefix_tokens`.

vLLM renders the chats of all endpoints with one method of its renderer. The messages of the document are rendered alone
by the same method with the same arguments. If the prompt begins with their tokens, the document ends after them. Some
templates do not work that way: they leave out parts of earlier turns, or refuse some messages alone.
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
"""Number of documents that are remembered; each takes about 100 bytes."""
WITHOUT_ANSWER = {"add_generation_prompt": False, "continue_final_message": False}


class TokenizedDocument(NamedTuple):
    """A document, as a count and a digest of its tokens: enough to recognize them.

    Attributes:
        num_tokens: Number of tokens.
        digest: SHA-256 of the token ids.
    """

    num_tokens: int
    digest: bytes

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Self:
        """Returns the count and the digest of these token ids."""
        return cls(len(tokens), hashlib.sha256(array("q", tokens)).digest())

    def begins(self, whole: Sequence[int]) -> bool:
        """Whether a prompt begins with the document's tokens."""
        return self.num_tokens > 0 and self == self.of(whole[: self.num_tokens])


class DocumentFinder:
    """Adds to each rendered chat the end of its document, if its request has one.

    In place of the end it may add an error, which is raised when the prompt goes to the engine: vLLM also renders chats
    of its own. Documents are remembered, since each is asked about many times, and tokenizing a long one takes longer
    than finding its rows.

    Args:
        render_chat_async: The method of vLLM's renderer.
    """

    def __init__(self, render_chat_async: Any) -> None:
        self._render = render_chat_async
        self._known: dict[bytes, TokenizedDocument] = {}  # in order of use, the most recent last

    async def render(self, conversations: Sequence[Any], chat_params: Any, tok_params: Any, **others: Any) -> Any:
        """Returns what vLLM's method returns: the conversations, and the prompts for the engine."""
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
        """Returns the document of these messages, rendered alone or, if the prompt begins with it, from memory.

        A template may insert the date, so a remembered document may have other tokens now.

        Raises:
            ParamError: The chat template refuses the messages.
        """
        # The key has all arguments, so that the time of a request with another `cache_salt` does not reveal a document.
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
    """Wraps the rendering method of vLLM's renderer, which all endpoints share, in a `DocumentFinder`."""
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
        ParamError: The chat has fewer messages, or other ones than the request, or these hold more than text.
    """
    last, given = document.num_messages, document.num_given
    if given is not None and given != len(messages):
        raise ParamError(
            NAME,
            f"{NAME} does not work here: vLLM makes a chat of {len(messages)} messages from the {given} of this "
            f"request, including the system message; {INSTEAD}.",
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
        ParamError: The prompt does not begin with these tokens, or has no others.
    """
    if not document.begins(whole):
        raise ParamError(
            NAME,
            f"{NAME} does not work here: the chat template or the tokenizer gives the first {len(beginning)} messages "
            f"other tokens alone than at the beginning of this prompt; {INSTEAD}, or let the document end with "
            "another message.",
        )
    if document.num_tokens == len(whole):
        raise ParamError(
            NAME, f"{NAME} covers the whole prompt, but at least one token must follow the document; add a message."
        )
    return document.num_tokens
