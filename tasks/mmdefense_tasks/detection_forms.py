"""Schemas of COCO json and of JSON lines with boxes, for the fields that are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, TypeAdapter

__all__ = ["COCO", "LINE", "MOST_PIXELS_A_SIDE", "Coco", "Line"]

MOST_PIXELS_A_SIDE = 10**6
"""Largest side of an annotated image; ours."""

Box = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
Side = Annotated[int | None, Field(le=MOST_PIXELS_A_SIDE)]
Crowd = Annotated[bool, BeforeValidator(lambda flag: flag or False)]  # null means no crowd
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Number = Annotated[int, Field(ge=0, lt=2**31)]


class _Form(BaseModel):
    """Accepts numbers written as text, and text written as numbers, as some tools do."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Category(_Form):
    """A class of COCO json."""

    id: Number
    name: str
    supercategory: str | None = None


class Picture(_Form):
    """An image of COCO json."""

    id: str
    file_name: Name
    width: Side = None
    height: Side = None


class Thing(_Form):
    """An object of COCO json; its box is x, y, width and height."""

    image_id: str
    category_id: Number
    bbox: Box
    iscrowd: Crowd = False


class Coco(_Form):
    """COCO json of instances."""

    images: list[Picture]
    annotations: list[Thing]
    categories: list[Category]


class Line(_Form):
    """A JSON line: an image with its boxes x1, y1, x2, y2."""

    file: Name
    boxes: list[Box]
    labels: list[Number]
    iscrowd: list[Crowd] | None = None
    width: Side = None
    height: Side = None


COCO = TypeAdapter(Coco)
LINE = TypeAdapter(Line)
