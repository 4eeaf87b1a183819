package source

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"testing"

	amqp "github.com/Azure/go-amqp"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/go-json-experiment/json/jsontext"

	"isobar.dev/config/local"
	"isobar.dev/events"
	"isobar.dev/internal/rabbit"
)

// forge changes a body of one data section into an amqp-sequence of the same length, which go-amqp does not write.
type forge struct{ net.Conn }

const (
	asData     = "\x00\x53\x75\xa0\x05\x02\x54\x01\x54\x02"
	asSequence = "\x00\x53\x76\xc0\x05\x02\x54\x01\x54\x02"
)

func (f forge) Write(p []byte) (int, error) {
	if _, err := f.Conn.Write(bytes.ReplaceAll(p, []byte(asData), []byte(asSequence))); err != nil {
		return 0, err
	}
	return len(p), nil
}

// TestRabbitUnusual publishes what AMQP 1.0 allows and the decoder does not take, among good ones.
func TestRabbitUnusual(t *testing.T) {
	w := startRabbitMQ(t)
	id := "m-1"
	for name, c := range map[string]struct {
		message *amqp.Message
		taken   string // what the sink gets as data; "" where it must be dead-lettered
		reason  string
		kept    []byte // what the dead letter's data must contain
	}{
		"a sequence": {
			message: &amqp.Message{Data: [][]byte{[]byte(asData[5:])}},
			reason:  "unknown message section 0x76", kept: []byte(asSequence),
		},
		"a map": {
			message: &amqp.Message{Value: map[string]any{"country": "GT"}},
			reason:  "AMQP value of type map", kept: []byte("country"),
		},
		"a number":            {message: &amqp.Message{Value: int64(7)}, reason: "AMQP value of type int64", kept: []byte{0x77}},
		"text":                {message: &amqp.Message{Value: `{"country":"GT"}`}, taken: `{"country":"GT"}`},
		"binary":              {message: &amqp.Message{Value: []byte("\x00\xff")}, taken: "\x00\xff"},
		"two data sections":   {message: &amqp.Message{Data: [][]byte{[]byte(`{"a":`), []byte(`1}`)}}, taken: `{"a":1}`},
		"a large message":     {message: &amqp.Message{Data: [][]byte{bytes.Repeat([]byte("x"), 3<<20)}}, taken: strings.Repeat("x", 3<<20)},
		"a structured event":  {message: structuredMessage(`{"specversion":"1.0","id":"m-1","source":"/s","type":"t","data":1}`), taken: "1"},
		"a structured ruin":   {message: structuredMessage(`{"specversion":"1.0","id":`), taken: `{"specversion":"1.0","id":`},
		"a binary mode event": {message: binaryMessage(), taken: `{"a":1}`},
	} {
		t.Run(name, func(t *testing.T) {
			queue := "unusual-" + strings.ReplaceAll(name, " ", "-")
			w.create(t, queue)
			w.create(t, queue+".dead")
			if c.message.Properties == nil {
				c.message.Properties = &amqp.MessageProperties{}
			}
			c.message.Properties.MessageID = id
			around := reports("good", 20)
			w.publish(t, queue, around[:10])
			publishForged(t, w, queue, c.message)
			w.publish(t, queue, around[10:])

			sink := record(t)
			deliver(t, w.open(queue), sink.settings())
			sink.awaitAll(t, around)
			if c.reason == "" {
				sink.await(t, "it is taken", func() bool { return sink.taken[id] > 0 })
				if e := sink.last[id]; string(e.Data()) != c.taken {
					t.Errorf("got %.200s", e)
				}
				return
			}
			letter := w.deadLetters(t, queue, 1)[id]
			if reason := fmt.Sprint(letter.Extensions()[errorData]); !strings.Contains(reason, c.reason) {
				t.Errorf("the reason is %q", reason)
			}
			if !bytes.Contains(letter.Data(), c.kept) {
				t.Errorf("%q is not in the dead letter %q", c.kept, letter.Data())
			}
			if sink.taken[id] > 0 {
				t.Error("the sink got it")
			}
		})
	}
}

func structuredMessage(body string) *amqp.Message {
	contentType := event.ApplicationCloudEventsJSON
	return &amqp.Message{Properties: &amqp.MessageProperties{ContentType: &contentType}, Data: [][]byte{[]byte(body)}}
}

func binaryMessage() *amqp.Message {
	contentType := "application/json"
	return &amqp.Message{
		Properties: &amqp.MessageProperties{ContentType: &contentType},
		ApplicationProperties: map[string]any{
			"cloudEvents:specversion": "1.0", "cloudEvents:id": "m-1", "cloudEvents:source": "/s", "cloudEvents:type": "t",
		},
		Data: [][]byte{[]byte(`{"a":1}`)},
	}
}

func publishForged(t *testing.T, w *world, queue string, m *amqp.Message) {
	t.Helper()
	conn, err := net.Dial("tcp", w.server.Addr())
	if err != nil {
		t.Fatal(err)
	}
	client, err := amqp.New(forge{conn}, amqp.ConnSASLPlain(local.RabbitUser, local.RabbitPassword),
		amqp.ConnServerHostname("vhost:/"), amqp.ConnContainerID("forger"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	sender, err := session.NewSender(amqp.LinkTargetAddress(rabbit.Queue(queue)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10e9)
	defer cancel()
	if err := sender.Send(ctx, m); err != nil {
		t.Fatal(err)
	}
}

// FuzzReadMessage reads whatever may stand in a message's frames.
func FuzzReadMessage(f *testing.F) {
	for _, m := range []*amqp.Message{
		structuredMessage(`{"specversion":"1.0","id":"m-1","source":"/s","type":"t","data":1}`),
		structuredMessage(`{`), binaryMessage(),
		{Value: map[string]any{"a": "b"}},
		{Value: "text"},
		{Data: [][]byte{{1}, {2}}},
		{Properties: &amqp.MessageProperties{MessageID: uint64(7)}},
	} {
		data, err := m.MarshalBinary()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(asSequence))
	f.Add([]byte{})
	f.Add([]byte("0 "))
	r := &Rabbit{source: "/rabbitmq/message"}
	f.Fuzz(func(t *testing.T, message []byte) {
		before := bytes.Clone(message)
		e := r.read(message)
		if !jsontext.Value(e.JSON).IsValid() || jsontext.Value(e.JSON).Kind() != '{' {
			t.Fatalf("not one JSON object: %q", e.JSON)
		}
		if !bytes.Equal(before, message) {
			t.Fatal("it has changed the message")
		}
		m := new(amqp.Message)
		if err := decode(m, before); (err != nil) != (e.Unreadable != nil) {
			t.Fatalf("the decoder says %v, the source %v", err, e.Unreadable)
		}
		if e.Unreadable != nil {
			// What happens to be JSON loses the white space around it.
			if kept := events.Recover(e.JSON); !bytes.Equal(bytes.TrimSpace(kept.Data()), bytes.TrimSpace(before)) {
				t.Fatalf("the dead letter holds %q", kept.Data())
			}
			return
		}
		if m.Properties == nil || m.Properties.MessageID == nil {
			return // a new id each time
		}
		want, got := events.ReadMessage(m, r.source), events.Recover(e.JSON)
		if want.ID() != got.ID() && want.ID() == strings.ToValidUTF8(want.ID(), "") {
			t.Fatalf("it is %q, and not %q", got.ID(), want.ID())
		}
		if !bytes.Equal(want.Data(), got.Data()) && !jsontext.Value(want.Data()).IsValid() {
			t.Fatalf("its data is %q, and not %q", got.Data(), want.Data())
		}
	})
}
