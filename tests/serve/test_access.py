from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lum_ray.artifacts import UserError
from serve.access import Rate, Token, check_exposure, new_token, read_tokens
from serve.ingress import create_app
from serve.types import ErrorResponse
from tests.serve.fake_predictor import FakePredictor, local

ONE: dict[str, Any] = {"users": [{"user": "u1"}]}
PREDICT = "/v1/lumos/predict"


def client(*names: str, requests_per_s: float = 0.0) -> tuple[TestClient, dict[str, str]]:
    """A server, and the token of each name."""
    made = {name: new_token(name) for name in names}
    tokens = [Token(*line.split()) for _, line in made.values()]
    app = create_app({"lumos": local(FakePredictor())}, None, tokens, requests_per_s)
    return TestClient(app), {name: token for name, (token, _) in made.items()}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_only_known_tokens_are_answered() -> None:
    web, tokens = client("shop", "app")
    for token in tokens.values():
        assert web.post(PREDICT, json=ONE, headers=bearer(token)).status_code == 200
    wrong = [{}, bearer(""), bearer(tokens["shop"][:-1]), {"Authorization": tokens["shop"]}, bearer("\xff"),
             {"Authorization": f"Basic {tokens['shop']}"}]  # fmt: skip
    for headers in wrong:
        response = web.post(
            PREDICT, json=ONE, headers={name: value.encode("latin-1") for name, value in headers.items()}
        )
        assert response.status_code == 401, headers
        assert ErrorResponse.model_validate_json(response.content).error.code == "unauthorized"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert web.get("/v1/models", headers={"authorization": f"bearer {tokens['app']}"}).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
def test_health_and_the_page_need_no_token(path: str) -> None:
    assert client("shop")[0].get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/lumos/users", "/docs", "/openapi.json", "/nothing", "//", "/healthz/"]
)
def test_all_the_rest_does(path: str) -> None:
    assert client("shop")[0].get(f"http://testserver{path}").status_code == 401


def test_a_token_that_asks_too_often_waits_and_the_other_does_not() -> None:
    web, tokens = client("shop", "app", requests_per_s=2.0)
    found = [web.get("/v1/models", headers=bearer(tokens["shop"])) for _ in range(4)]
    assert [response.status_code for response in found][:2] == [200, 200]
    assert found[3].status_code == 429
    assert ErrorResponse.model_validate_json(found[3].content).error.code == "too_often"
    assert int(found[3].headers["Retry-After"]) >= 1
    assert web.get("/v1/models", headers=bearer(tokens["app"])).status_code == 200
    assert web.get("/healthz").status_code == 200


def test_a_rate_fills_up_again() -> None:
    now = [0.0]
    rate = Rate(per_s=2.0, burst=2.0, clock=lambda: now[0])
    assert [rate.wait_s(), rate.wait_s(), rate.wait_s()] == [0.0, 0.0, 0.5]
    now[0] = 0.5
    assert [rate.wait_s(), rate.wait_s()] == [0.0, 0.5]
    now[0] = 100.0
    assert [rate.wait_s(), rate.wait_s(), rate.wait_s() > 0] == [0.0, 0.0, True]


def test_tokens_are_read_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, line = new_token("shop")
    assert token not in line
    other = new_token("app")[1]
    place = tmp_path / "tokens"
    place.write_text(f"# who may ask\n{line}\n\n{other}\n")
    assert [one.name for one in read_tokens(str(place))] == ["shop", "app"]
    monkeypatch.setenv("LUM_TOKENS", f"{line},{other}")
    assert read_tokens("env:LUM_TOKENS") == read_tokens(str(place))
    place.write_text(f"{line}\nshop {token}\n")
    with pytest.raises(UserError, match="line 2") as caught:
        read_tokens(str(place))
    assert token not in str(caught.value)
    place.write_text("# none\n")
    with pytest.raises(UserError, match="holds no token"):
        read_tokens(str(place))
    with pytest.raises(UserError, match="no such file"):
        read_tokens(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="not set"):
        read_tokens("env:LUM_NOTHING")
    with pytest.raises(UserError, match="expected a name"):
        new_token("two words")


def test_without_tokens_nobody_else_can_ask_unless_that_is_said() -> None:
    with pytest.raises(UserError, match=r"serve\.host: 0\.0\.0\.0"):
        check_exposure("0.0.0.0", None, False)
    check_exposure("0.0.0.0", None, True)
    check_exposure("0.0.0.0", "tokens", False)
    check_exposure("127.0.0.1", None, False)
