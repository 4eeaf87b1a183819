package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/config/local"
	"isobar.dev/events"
)

const sunny = `{"description":"Test","country":"GT","weather":"Sunny"}`

// The names are the promises of the contract, by their numbers.

func Test1AReportIsCountedByCountryAndWeatherAsItWasSent(t *testing.T) {
	s := running(t)
	for _, r := range []string{
		sunny,
		`{"country":"gt","weather":"Rain"}`,
		`{"country":"ESP","weather":"Sunny","unknown":{"x":1}}`,
		`{"country":"es","weather":"☀️"}`,
	} {
		posted(t, 202, s.URL()+"/reports", r)
	}
	posted(t, 422, s.URL()+"/reports", `{"country":"XX","weather":"Sunny"}`)
	counted(t, s, counts{
		4, map[string]int{"GT": 2, "ESP": 1, "ES": 1}, map[string]int{"Sunny": 2, "Rain": 1, "☀️": 1},
	})
}

func Test2AReportTravelsAsACloudEvent(t *testing.T) {
	s := running(t)
	const traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	kafka := kafkaClient(t, s)
	before := ends(t, kafka, "message")
	source := s.Process(local.RabbitMQSource)
	kill(t, source)

	id := posted(t, 202, s.URL()+"/reports", sunny, "traceparent", traceparent).ids(t)[0]
	posted(t, 202, s.URL(), `{"specversion":"1.0","type":"dev.isobar.weather.report.v1","source":"/a/station","id":"x-1","data":`+sunny+`}`,
		"Content-Type", "application/cloudevents+json", "traceparent", traceparent)

	check := func(where string, all []event.Event) {
		t.Helper()
		if len(all) != 2 {
			t.Fatalf("%s has %d events, want 2", where, len(all))
		}
		for _, e := range all {
			source := events.DefaultSource
			if e.ID() != id {
				if source = "/a/station"; e.ID() != "x-1" {
					t.Errorf("%s has the id %q", where, e.ID())
				}
			}
			if e.SpecVersion() != "1.0" || e.Type() != events.Type || e.Subject() != "GT" || e.Source() != source ||
				e.DataContentType() != "application/json" || string(e.Data()) != sunny ||
				e.Extensions()["traceparent"] != traceparent || e.Time().IsZero() {
				t.Errorf("%s has %s", where, e)
			}
		}
	}
	var fromKafka, fromRabbitMQ []event.Event
	for _, record := range records(t, kafka, "message", before) {
		fromKafka = append(fromKafka, events.ReadRecord(record, "none"))
	}
	check("Kafka", fromKafka)

	taken := take(t, s, "message", 2)
	for _, m := range taken {
		if *m.Properties.ContentType != "application/cloudevents+json" {
			t.Errorf("RabbitMQ has the content type %s", *m.Properties.ContentType)
		}
		fromRabbitMQ = append(fromRabbitMQ, events.ReadMessage(m, "none"))
	}
	check("RabbitMQ", fromRabbitMQ)

	sender := queueSender(t, s)
	for _, m := range taken { // taking them was accepting them
		again := amqp.NewMessage(m.GetData())
		again.Properties = &amqp.MessageProperties{ContentType: m.Properties.ContentType}
		if err := sender.Send(t.Context(), again); err != nil {
			t.Fatal(err)
		}
	}
	start(t, source)
	counted(t, s, sunnyInGT(2))
}

func Test3Only202IsAPromiseAndSendingAgainIsSafe(t *testing.T) {
	for _, broker := range []string{"kafka", "rabbitmq"} {
		t.Run(broker+" is away", func(t *testing.T) {
			s := running(t)
			p := s.Process(broker)
			kill(t, p)
			a := posted(t, http.StatusServiceUnavailable, s.URL()+"/reports", sunny, "Idempotency-Key", `"again-`+broker+`"`)
			if a.header.Get("Retry-After") == "" || a.header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("the answer has the header %v", a.header)
			}
			if ids := a.ids(t); len(ids) != 1 || ids[0] != "again-"+broker {
				t.Errorf("the answer names %v", ids)
			}
			start(t, p)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for range 3 {
				if err := insist(ctx, s.URL()+"/reports", sunny, "Idempotency-Key", "again-"+broker); err != nil {
					t.Fatal(err)
				}
			}
			counted(t, s, sunnyInGT(1))
		})
	}
}

func Test4AnIDIsCountedOnceHoweverOftenAndBroadlyItComes(t *testing.T) {
	s := running(t)
	var posting sync.WaitGroup
	errs := make(chan error, 64)
	for range 8 {
		posting.Go(func() {
			for i := range 50 {
				// The same fifty ids from everybody, at the ingress and at the publisher.
				url := s.URL()
				if i%2 == 1 {
					url = "http://" + s.Addr(local.Publisher)
				}
				if err := insist(t.Context(), url, sunny, "Idempotency-Key", fmt.Sprint("same-", i)); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	posting.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	array := "[" + strings.Repeat(sunny+",", 9) + sunny + "]"
	for range 3 {
		a := posted(t, 202, s.URL(), array, "Idempotency-Key", `"array"`)
		if ids := a.ids(t); len(ids) != 10 || ids[9] != "array/9" {
			t.Errorf("the answer names %v", ids)
		}
	}
	counted(t, s, sunnyInGT(60))
}

func Test5WhatCanNeverBeCountedIsKeptAndHoldsNothingUp(t *testing.T) {
	s := running(t)
	good := func(i int) string { return fmt.Sprintf(`{"country":"GT","weather":"Sunny","n":%d}`, i) }
	const poison = `{"country":"NOWHERE","weather":"Sunny"}`

	kafka := kafkaClient(t, s)
	before := ends(t, kafka, "message.dead")
	producer, err := sarama.NewSyncProducerFromClient(kafka)
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()
	sender := queueSender(t, s)
	var batch []*sarama.ProducerMessage
	for i := range 1001 {
		body := good(i)
		if i == 500 {
			body = poison
		}
		// A producer that knows nothing of CloudEvents, straight into the topic and the queue.
		batch = append(batch, &sarama.ProducerMessage{Topic: "message", Value: sarama.StringEncoder(body)})
		m := amqp.NewMessage([]byte(body))
		m.Properties = &amqp.MessageProperties{MessageID: fmt.Sprint("foreign-", i)}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if err := sender.Send(ctx, m); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	if err := producer.SendMessages(batch); err != nil {
		t.Fatal(err)
	}

	counted(t, s, sunnyInGT(1000))
	var dead []*sarama.ConsumerMessage
	for deadline := time.Now().Add(20 * time.Second); len(dead) == 0 && time.Now().Before(deadline); {
		dead = records(t, kafka, "message.dead", before)
	}
	if len(dead) != 1 || !strings.Contains(string(dead[0].Value), "NOWHERE") {
		t.Fatalf("%d dead letters on Kafka: %v", len(dead), dead)
	}
	reason(t, "Kafka", events.ReadRecord(dead[0], "none"))
	messages := take(t, s, "message.dead", 1)
	if len(messages) != 1 {
		t.Fatalf("%d dead letters on RabbitMQ", len(messages))
	}
	letter := events.ReadMessage(messages[0], "none")
	if !strings.Contains(string(letter.Data()), "NOWHERE") {
		t.Errorf("the dead letter on RabbitMQ is %s", letter)
	}
	reason(t, "RabbitMQ", letter)
}

func reason(t *testing.T, where string, e event.Event) {
	t.Helper()
	x := e.Extensions()
	if fmt.Sprint(x["knativeerrorcode"]) != "422" || !strings.Contains(fmt.Sprint(x["knativeerrordata"]), "ISO 3166") || x["knativeerrordest"] == nil {
		t.Errorf("the dead letter on %s has the reason %v", where, x)
	}
}

func Test6WhatIsPromisedSurvivesTheDeathOfEverything(t *testing.T) {
	s := running(t)
	const n = 500
	var posting sync.WaitGroup
	for i := range 10 {
		posting.Go(func() {
			for j := range n / 10 {
				if err := insist(t.Context(), s.URL(), sunny, "Idempotency-Key", fmt.Sprintf("%d-%d", i, j)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	posting.Wait()
	var dying sync.WaitGroup
	for _, p := range s.Processes() {
		dying.Go(func() {
			if err := p.Kill(); err != nil {
				t.Error(err)
			}
		})
	}
	dying.Wait()
	for _, p := range s.Processes() {
		start(t, p)
	}
	counted(t, s, sunnyInGT(n))
}

func TestSIGTERMUnderLoadLosesNoRequest(t *testing.T) {
	for _, name := range []string{
		local.Ingress, local.Publisher, local.KafkaSource, local.RabbitMQSource, local.RedisWriter, local.ValkeyWriter,
	} {
		t.Run(name, func(t *testing.T) {
			s := running(t)
			p := s.Process(name)
			ctx, cancel := context.WithCancel(t.Context())
			var posting sync.WaitGroup
			var mu sync.Mutex
			accepted := 0
			some := make(chan struct{}, 1)
			for range 20 {
				posting.Go(func() {
					for ctx.Err() == nil {
						a, err := post(context.Background(), s.URL(), sunny)
						switch {
						case err != nil && strings.Contains(err.Error(), "connection refused"): // nobody read it
							time.Sleep(10 * time.Millisecond)
						case err != nil:
							t.Errorf("a request was lost: %v", err)
							return
						case a.status == 202:
							mu.Lock()
							accepted++
							mu.Unlock()
							select {
							case some <- struct{}{}:
							default:
							}
						case a.status != 503 && a.status != 429:
							t.Errorf("answered %d %s", a.status, a.body)
						}
					}
				})
			}
			for range 100 {
				<-some
			}
			stopping, stopped := context.WithTimeout(context.Background(), 30*time.Second)
			defer stopped()
			if err := p.Stop(stopping); err != nil {
				t.Error(err)
			}
			start(t, p)
			for range 100 {
				<-some
			}
			cancel()
			posting.Wait()
			// A 503 may have been counted too, when only the answer was lost; a source's and a writer's end loses none.
			for store, c := range stores(t, s) {
				var got counts
				for deadline := time.Now().Add(30 * time.Second); got.total < accepted; {
					if time.Now().After(deadline) {
						t.Fatalf("%d were accepted, %s has counted %d", accepted, store, got.total)
					}
					got, _ = read(t.Context(), c)
				}
			}
		})
	}
}
