"""Where the document of a chat ends: `kv_prefix_messages` becomes `kv_prefix_tokens`.

vLLM renders every chat with one method of its renderer, whichever endpoint it came to. The messages of the document are
rendered by the same method with the same arguments. If their tokens begin the whole prompt, their number is where the
document ends. A template need not work that way: it may drop parts of earlier turns, or refuse some messages alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import has_non_text_content

from vllm_l2kv.field_kinds import ParamError
from vllm_l2kv.params import PREFIX_MESSAGES, PREFIX_TOKENS
from vllm_l2kv_server.context import ChatDocument, current

NAME = PREFIX_MESSAGES.name
INSTEAD = f"give {PREFIX_TOKENS.name} instead"
WITHOUT_ANSWER = {"add_generation_prompt": False, "continue_final_message": False}


class DocumentFinder:
    """Notes on each rendered chat where its document ends, if its request has one.

    An error is noted too. It is raised when the prompt goes to the engine, since vLLM also renders chats of its own.

    Args:
        render_chat_async: The method of vLLM's renderer.
    """

    def __init__(self, render_chat_async: Any) -> None:
        self._render = render_chat_async

    async def render(self, conversations: Sequence[Any], chat_params: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what vLLM's method does: the conversations, and the prompts for the engine."""
        rendered = await self._render(conversations, chat_params, *args, **kwargs)
        compression = current.get()
        if compression is None or compression.document is None:
            return rendered
        without_answer = replace(
            chat_params, chat_template_kwargs={**chat_params.chat_template_kwargs, **WITHOUT_ANSWER}
        )
        for messages, prompt in zip(conversations, rendered[1], strict=True):
            try:
                beginning = _messages_of(compression.document, messages)
                _, (document,) = await self._render([beginning], without_answer, *args, **kwargs)
                prompt[PREFIX_TOKENS.name] = _checked_end(beginning, document, prompt)
            except ParamError as error:
                prompt[PREFIX_TOKENS.name] = error
            except VLLMValidationError as error:
                prompt[PREFIX_TOKENS.name] = ParamError(
                    NAME,
                    f"{NAME} does not work here: the chat template refuses the first {len(beginning)} messages alone "
                    f"({error.args[0]}); {INSTEAD}, or let the document end with a later message.",
                )
        return rendered


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


def _checked_end(beginning: Sequence[Any], document: Any, prompt: Any) -> int:
    """Returns the document's number of tokens.

    Raises:
        ParamError: They are no strict beginning of the prompt's.
    """
    tokens, whole = document.get("prompt_token_ids"), prompt.get("prompt_token_ids")
    if not tokens or not whole or whole[: len(tokens)] != tokens:
        raise ParamError(
            NAME,
            f"{NAME} does not work here: alone, the first {len(beginning)} messages become other tokens than at the "
            f"beginning of this prompt, by the chat template or the tokenizer; {INSTEAD}, or let the document end with "
            "another message.",
        )
    if len(tokens) == len(whole):
        raise ParamError(
            NAME, f"{NAME} names the whole prompt, and at least one token must follow the document; add a message."
        )
    return len(tokens)
