"""What every section of the experiment is made of."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

# A secret may hold slashes, so the whole URI is looked at; an account alone is no secret, but for
# s3, where it is a key.
_CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^@]*:[^@]*@|s3://[^/@]*@", re.IGNORECASE)
_SECRET_OPTIONS = re.compile(r"[?&](sig|sas_token|[a-z_]*(secret|key|password))=", re.IGNORECASE)


def _without_credentials(uri: str) -> str:
    if _CREDENTIALS.match(uri):
        raise ValueError(
            "this URI names credentials, which every manifest and log would show: take what stands "
            "before the @ out of it, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what "
            "your store asks for) in the environment"
        )
    if _SECRET_OPTIONS.search(uri):
        raise ValueError(
            "this URI has a secret among its options, which every manifest and log would show: set "
            "it in the environment, as your store asks for it"
        )
    return uri


def _plain(uri: str) -> str:
    if "://" in uri and ("?" in uri or "#" in uri):
        raise ValueError(
            "this URI has options: take what stands after the ? or # out of it, and set "
            "AWS_ENDPOINT_URL and AWS_REGION (or what your store asks for) in the environment"
        )
    return uri


def _without_login(url: str) -> str:
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "this address carries a user name or a password, which every report would show: take "
            "them out, and name the variable that holds a token or key in token_env or api_key_env"
        )
    return url


Address = Annotated[Text, AfterValidator(_without_login)]
"""The URL of an endpoint."""
Location = Annotated[Text, AfterValidator(_without_credentials)]
"""A folder, file or URI."""
PlainLocation = Annotated[Location, AfterValidator(_plain)]
"""A folder, or a URI that only says where."""


class Section(BaseModel):
    """A table of the experiment file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def as_tree(section: BaseModel) -> Mapping[str, Any]:
    """Return a section as plain JSON types, for fingerprints and for printing."""
    tree: Mapping[str, Any] = section.model_dump(mode="json")
    return tree
