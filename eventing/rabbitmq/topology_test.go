package rabbitmq_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"go.yaml.in/yaml/v3"

	"isobar.dev/config/local"
	"isobar.dev/eventing/rabbitmq"
	"isobar.dev/eventing/source"
	"isobar.dev/eventing/source/link"
	"isobar.dev/events"
	"isobar.dev/internal/rabbit"
)

// resource is one of topology.yaml.
type resource struct {
	Kind string
	Spec struct {
		Name, Type, Vhost, Source, Destination, DestinationType, RoutingKey string

		Durable, AutoDelete bool
		Arguments           map[string]any
		Permissions         local.Permissions
	}
}

func topology(t *testing.T) []resource {
	t.Helper()
	text, err := os.ReadFile("topology.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var all []resource
	for documents := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var document any
		if err := documents.Decode(&document); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		asJSON, err := json.Marshal(document) // whose field names are found in any case
		if err != nil {
			t.Fatal(err)
		}
		var r resource
		if err := json.Unmarshal(asJSON, &r); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
}

func TestTopologySaysWhatTheDefinitionsSay(t *testing.T) {
	type object = map[string]any
	arguments := func(r resource, more object) object {
		if r.Spec.Arguments != nil {
			more = r.Spec.Arguments
		}
		if r.Spec.Type == "quorum" {
			more["x-queue-type"] = r.Spec.Type
		}
		return more
	}
	// As the operator has them, who leaves what is not said to RabbitMQ.
	said := map[string][]object{"vhosts": {{"name": "/"}}}
	for _, r := range topology(t) {
		switch s := r.Spec; r.Kind {
		case "Exchange":
			said["exchanges"] = append(said["exchanges"], object{
				"name": s.Name, "vhost": "/", "type": s.Type, "durable": s.Durable, "auto_delete": s.AutoDelete, "internal": false,
				"arguments": arguments(r, object{}),
			})
		case "Queue":
			said["queues"] = append(said["queues"], object{
				"name": s.Name, "vhost": "/", "durable": s.Durable, "auto_delete": s.AutoDelete, "arguments": arguments(r, object{}),
			})
		case "Binding":
			said["bindings"] = append(said["bindings"], object{
				"source": s.Source, "vhost": "/", "destination": s.Destination, "destination_type": s.DestinationType,
				"routing_key": s.RoutingKey, "arguments": arguments(r, object{}),
			})
		}
	}
	text, err := json.Marshal(said)
	if err != nil {
		t.Fatal(err)
	}
	var got, want any
	if err := errors.Join(json.Unmarshal(text, &got), json.Unmarshal(rabbitmq.Definitions, &want)); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("topology.yaml says\n%s\nand definitions.json\n%s", text, rabbitmq.Definitions)
	}
}

// TestPermissions has the user of topology.yaml do all that the programs do, and try what else there is.
func TestPermissions(t *testing.T) {
	var may local.Permissions
	for _, r := range topology(t) {
		if r.Kind == "Permission" {
			may = r.Spec.Permissions
		}
	}
	management, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	server := local.StartRabbitMQ(t, local.Account("isobar", "secret", may), local.Management(management))
	user := rabbit.Settings{Addr: server.Addr(), Username: "isobar", Password: "secret"}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	web := &web{t, fmt.Sprintf("http://127.0.0.1:%d/api/", management)}

	publish := func(t *testing.T, id string) {
		t.Helper()
		publisher := rabbit.NewSender(user, "message")
		defer publisher.Close()
		e := events.New(events.Report{Country: "GT", Weather: "Sunny"}, id, time.Now())
		if err := publisher.Send(ctx, events.WriteMessage(&e)); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("a report is published and delivered", func(t *testing.T) {
		publish(t, "good")
		if got := deliver(t, user, http.StatusNoContent); !strings.Contains(got, `"good"`) {
			t.Errorf("the sink got %s", got)
		}
	})
	t.Run("a report that the sink refuses is kept in message.dead", func(t *testing.T) {
		publish(t, "refused")
		deliver(t, user, http.StatusUnprocessableEntity)
		web.take("message.dead", "refused", "ack_requeue_false")
	})
	t.Run("a report that a consumer rejects is kept in message.dead", func(t *testing.T) {
		publish(t, "rejected")
		web.take("message", "rejected", "reject_requeue_false")
		web.take("message.dead", "rejected", "ack_requeue_false")
	})

	session := func(t *testing.T) *amqp.Session {
		t.Helper()
		conn, err := rabbit.Dial(ctx, user)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(conn.Close)
		s, err := conn.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for name, attempt := range map[string]func(t *testing.T) error{
		"dead letters can't be read": func(_ *testing.T) error {
			_, err := link.Open(ctx, user, "message.dead")
			return err
		},
		"the dead letter exchange can't be written to": func(t *testing.T) error {
			_, err := session(t).NewSender(amqp.LinkTargetAddress("/exchanges/message.dead"))
			return err
		},
		"another exchange can't be written to": func(t *testing.T) error {
			_, err := session(t).NewSender(amqp.LinkTargetAddress("/exchanges/amq.topic"))
			return err
		},
		"a queue can't be made": func(t *testing.T) error {
			_, err := session(t).NewSender(amqp.LinkTargetAddress("/queue/another")) // which makes it, by the old form of address
			return err
		},
		"the management interface takes no such user": func(*testing.T) error {
			_, err := web.ask(user.Username, user.Password, "overview", "")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := attempt(t)
			if err == nil {
				t.Fatal("it can")
			}
			if said := err.Error(); !strings.Contains(said, "unauthorized-access") && !strings.Contains(said, "401") {
				t.Errorf("it fails for another reason: %v", err)
			}
		})
	}
}

// deliver runs the source, until the test ends, with a sink that answers so, and returns the first that the sink gets.
func deliver(t *testing.T, user rabbit.Settings, status int) string {
	t.Helper()
	posted := make(chan string, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.WriteHeader(status)
		select {
		case posted <- string(body):
		default:
		}
	}))
	t.Cleanup(server.Close)
	sink, err := source.NewSink(source.SinkSettings{Sink: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	src, err := source.NewRabbit(source.RabbitSettings{Settings: user, Queue: "message", DeadQueue: "message.dead"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); source.Deliver(ctx, src, sink, 1); src.Close() }()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case body := <-posted:
		return body
	case <-time.After(30 * time.Second):
		t.Fatalf("nothing is delivered within 30 s; the source is %s", src.State())
		return ""
	}
}

// web is RabbitMQ's HTTP interface.
type web struct {
	t   *testing.T
	url string
}

// take takes a message that holds this text out of a queue, once it is there, and does with it what it is told.
func (w *web) take(queue, text, then string) {
	w.t.Helper()
	body := fmt.Sprintf(`{"count": 1, "encoding": "auto", "ackmode": %q}`, then)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		said, err := w.ask(local.RabbitUser, local.RabbitPassword, "queues/%2F/"+queue+"/get", body)
		if err == nil && strings.Contains(said, text) {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%q is not in %s: %s (%v)", text, queue, said, err)
		}
	}
}

func (w *web) ask(user, password, path, body string) (string, error) {
	method := http.MethodPost
	if body == "" {
		method = http.MethodGet
	}
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	r.SetBasicAuth(user, password)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = errors.New(answer.Status)
	}
	return string(said), err
}
