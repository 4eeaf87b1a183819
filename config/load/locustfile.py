"""Users who report the weather as people do: mostly one report at a time, now and then a list or a CloudEvent, from many
countries, some far more often than others. What is answered 429 or 503 is sent again under the same id, as the contract
has it.

    config/load/locust.sh --host http://localhost:8080

ROUTE_HOST is sent as the Host header, for a route whose name is not resolved here. ACCEPTED_FILE is written at the end: the
reports that were accepted, by country, which is by how much both stores must have grown.
"""

import collections
import json
import os
import random
import time
import uuid

from locust import FastHttpUser, between, events, task

COUNTRIES = {"GT": 30, "ES": 12, "US": 12, "DE": 8, "FR": 8, "BR": 6, "JP": 6, "MX": 6, "GBR": 4, "IND": 4, "ZA": 2, "NZ": 1, "IS": 1}
WEATHER = {"Sunny": 10, "Rain": 6, "Clouds": 6, "Fog": 2, "Snow": 1, "Storm": 1}
DESCRIPTIONS = ["", "Test", "as seen from the window", "measured at the harbour"]
TRIES = 20

accepted = collections.Counter()


def pick(weights):
    return random.choices(list(weights), list(weights.values()))[0]


def report():
    return {"description": random.choice(DESCRIPTIONS), "country": pick(COUNTRIES), "weather": pick(WEATHER)}


class Reporter(FastHttpUser):
    wait_time = between(0.1, 0.5)
    connection_timeout = 10
    network_timeout = 30

    @task(8)
    def single(self):
        r = report()
        self.send("a report", [r], r, {"Content-Type": "application/json", "Idempotency-Key": f'"{uuid.uuid4()}"'})

    @task(1)
    def several(self):
        r = [report() for _ in range(random.randint(2, 20))]
        self.send("a list", r, r, {"Content-Type": "application/json", "Idempotency-Key": f'"{uuid.uuid4()}"'})

    @task(1)
    def event(self):
        r = report()
        e = {"specversion": "1.0", "type": "dev.isobar.weather.report.v1", "source": "/locust", "id": str(uuid.uuid4()), "data": r}
        self.send("a CloudEvent", [r], e, {"Content-Type": "application/cloudevents+json"})

    def send(self, name, reports, body, headers):
        if host := os.environ.get("ROUTE_HOST"):
            headers["Host"] = host
        body = json.dumps(body)
        for _ in range(TRIES):
            with self.client.post("/reports", data=body, headers=headers, name=name, catch_response=True) as answer:
                if answer.status_code == 202:
                    answer.success()
                    accepted.update(r["country"] for r in reports)
                    return
                answer.failure(f"{answer.status_code} {(answer.text or answer.error or '')[:200]}")
                if answer.status_code and answer.status_code not in (404, 429) and answer.status_code < 500:
                    return
            time.sleep(0.2)


@events.quitting.add_listener
def write_accepted(**_):
    if path := os.environ.get("ACCEPTED_FILE"):
        with open(path, "w", encoding="utf-8") as f:
            json.dump(accepted, f)
