from adapter.errors import ConfigError, HandlerError, Timeout
from adapter.hosts import Deployment
from adapter.openfaas.setbacks import BACKOFF_S, Setbacks
from adapter.spec import parse_spec

FN = Deployment("fn", "ns", "1", "fn", parse_spec({}, {}))


def test_each_failed_start_in_a_row_is_waited_after_for_longer_up_to_a_limit():
    setbacks, now_s = Setbacks(), 100.0
    for wait_s in (*BACKOFF_S, BACKOFF_S[-1]):
        assert setbacks.add(Timeout("slow"), now_s)
        assert setbacks.holds(now_s)
        assert setbacks.for_caller(FN, now_s).retry_after_s == wait_s
        now_s += wait_s
        assert not setbacks.holds(now_s)
    setbacks.served()
    assert setbacks.error is None
    assert setbacks.add(Timeout("slow"), now_s)
    assert setbacks.retry_at_s == now_s + BACKOFF_S[0]


def test_a_first_one_that_was_killed_is_tried_again_at_once():
    setbacks = Setbacks()
    killed = HandlerError("killed", code="replica-died")
    assert not setbacks.add(killed, 0.0)
    assert (setbacks.holds(0.0), setbacks.error) == (False, None)
    assert setbacks.add(killed, 0.0)
    assert setbacks.holds(0.0)


def test_who_asks_for_it_by_hand_does_not_wait_and_the_reason_stays():
    setbacks = Setbacks()
    setbacks.add(Timeout("slow"), 0.0)
    setbacks.retry()
    assert (setbacks.holds(0.0), setbacks.error is None) == (False, False)
    setbacks.forget()
    assert setbacks.error is None


def test_a_caller_hears_nothing_of_what_the_deployer_has_to_mend():
    setbacks = Setbacks()
    setbacks.add(ConfigError("The secret token is missing.", code="secret-missing"), 0.0)
    heard = setbacks.for_caller(FN, 0.0)
    assert (type(heard), heard.http_status, heard.code) == (HandlerError, 503, "secret-missing")
    assert "token" not in heard.to_text()
