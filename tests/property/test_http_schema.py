"""schemathesis, told only our OpenAPI description, finds no request that the server breaks at."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from tests.serving import ScriptedEngine, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


def test_every_described_operation_answers_or_refuses() -> None:
    with serving(ScriptedEngine(max_queue=200)) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [o.ok() for o in schema.get_all_operations() if isinstance(o, Ok)]
        assert {"/v1/completions", "/v1/chat/completions"} <= {o.path for o in operations}
        for operation in operations:
            attack = settings(
                max_examples=30,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
            )(given(case=operation.as_strategy())(answered_or_refused))
            attack()


def answered_or_refused(case: schemathesis.Case) -> None:
    """The reply is one of the kinds that the description lists, and none says 5xx."""
    case.validate_response(case.call(timeout=30), checks=CHECKS)
