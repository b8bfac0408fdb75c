import psycopg


def test_the_shared_server_answers(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
