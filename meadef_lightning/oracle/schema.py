"""What a served oracle and its clients say to each other, as its OpenAPI page shows it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from meadef_lightning.oracle.policies import AnswerKind


class Query(BaseModel):
    """Questions: images in the model's (normalised) input space."""

    model_config = ConfigDict(extra="forbid", strict=True)

    shape: Annotated[list[int], Field(min_length=4, max_length=4, description="Rows, channels, height, width.")]
    data: Annotated[str, Field(description="Base64 of the little-endian float32 values, row by row.")]


class Answers(BaseModel):
    """The answers, and the client's account."""

    model: Annotated[str, Field(description="Random name of what answered; another one means other answers.")]
    kind: AnswerKind
    shape: Annotated[list[int], Field(description="Rows and classes, or rows alone for hard labels.")]
    data: Annotated[str, Field(description="Base64 of the little-endian float32 values, int64 for hard labels.")]
    spent: Annotated[int, Field(description="Distinct inputs this client has asked so far.")]
    remaining: Annotated[
        int | None, Field(description="Distinct inputs the budget still allows; null without a budget.")
    ]


class Info(BaseModel):
    """What a client must know to ask."""

    model: Annotated[str, Field(description="Random name of what answers; it says nothing about the weights.")]
    kind: AnswerKind
    num_classes: Annotated[int, Field(description="Width of an answer: classes, or features of an encoder.")]
    image_shape: Annotated[list[int], Field(description="Channels, height, width.")]
    max_rows: Annotated[int, Field(description="Most rows in a request.")]
    budget: int | None
    spent: int
    remaining: int | None


class Problem(BaseModel):
    """Why there is no answer. Some problems come with numbers beside the message, such as ``remaining``."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str


class Failure(BaseModel):
    """The body of every error."""

    error: Problem
