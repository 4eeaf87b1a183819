package source

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/go-json-experiment/json/jsontext"
	amqp091 "github.com/rabbitmq/amqp091-go"

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

// TestRabbitRescue publishes what makes RabbitMQ 4.0 or the client fail over AMQP 0.9.1, among good ones.
func TestRabbitRescue(t *testing.T) {
	w := startRabbitMQ(t)
	const id, body = "m-1", `{"country":"GT"}`
	properties := func(contentType string) *amqp.MessageProperties {
		return &amqp.MessageProperties{MessageID: id, ContentType: &contentType}
	}
	many := map[string]any{}
	for i := range 9000 {
		many[fmt.Sprint("key-", i)] = int64(i)
	}
	for name, message := range map[string]*amqp.Message{
		"a UUID as a property":      {Properties: properties("application/json"), ApplicationProperties: map[string]any{"trace": amqp.UUID{1}}, Data: [][]byte{[]byte(body)}},
		"a UUID as an annotation":   {Properties: properties("application/json"), Annotations: amqp.Annotations{"x-trace": amqp.UUID{1}}, Data: [][]byte{[]byte(body)}},
		"a content type of 300":     {Properties: properties("application/json;" + strings.Repeat("x", 300)), Data: [][]byte{[]byte(body)}},
		"headers beyond a frame":    {Properties: properties("application/json"), ApplicationProperties: map[string]any{"long": strings.Repeat("x", 300<<10)}, Data: [][]byte{[]byte(body)}},
		"too many headers":          {Properties: properties("application/json"), ApplicationProperties: many, Data: [][]byte{[]byte(body)}},
		"one that the sink refuses": {Properties: properties("application/json"), ApplicationProperties: map[string]any{"trace": amqp.UUID{1}}, Data: [][]byte{[]byte(body)}},
		"a map":                     {Properties: properties("application/json"), ApplicationProperties: map[string]any{"trace": amqp.UUID{1}}, Value: map[string]any{"country": "GT"}},
	} {
		t.Run(name, func(t *testing.T) {
			queue := "rescue-" + strings.ReplaceAll(name, " ", "-")
			w.create(t, queue)
			w.create(t, queue+".dead")
			around := reports("good", 60)
			w.publish(t, queue, around[:20])
			publishForged(t, w, queue, message)
			w.publish(t, queue, around[20:40])

			sink := record(t)
			if name == "one that the sink refuses" {
				sink.answer(func(batch []event.Event) (int, map[string]any) {
					if i := slices.IndexFunc(batch, func(e event.Event) bool { return e.ID() == id }); i >= 0 {
						return 422, map[string]any{"index": i}
					}
					return 204, nil
				})
			}
			first := deliver(t, w.open(queue), sink.settings())
			sink.awaitAll(t, around[:40])
			w.publish(t, queue, around[40:])
			sink.awaitAll(t, around)
			if name == "a map" || name == "one that the sink refuses" {
				letter := w.deadLetters(t, queue, 1)[id]
				if !bytes.Contains(letter.Data(), []byte("country")) {
					t.Errorf("the dead letter is %s", letter)
				}
			} else {
				sink.await(t, "it is taken", func() bool { return sink.taken[id] > 0 })
				if e := sink.last[id]; string(e.Data()) != body || e.Source() != "/rabbitmq/"+queue {
					t.Errorf("got %s", e)
				}
			}
			first.end()

			// It is settled: nobody gets it again.
			next := record(t)
			deliver(t, w.open(queue), next.settings())
			last := reports("last", 1)
			w.publish(t, queue, last)
			next.awaitAll(t, last)
			if next.taken[id] > 0 {
				t.Error("it came again")
			}
		})
	}
}

// TestRabbitIdentity: a message-id of any type names the same event however it arrives.
func TestRabbitIdentity(t *testing.T) {
	w := startRabbitMQ(t)
	w.create(t, "ids")
	w.create(t, "ids.dead")
	sink := record(t)
	deliver(t, w.open("ids"), sink.settings())
	long := strings.Repeat("i", 256) // more than a message-id of AMQP 0.9.1 holds
	for want, id := range map[string]any{
		"text": "text", long: long, "9223372036854775809": uint64(1<<63 + 1), "0102ff": []byte{1, 2, 0xff},
		"01020304-0506-0708-090a-0b0c0d0e0fff": amqp.UUID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255},
	} {
		for _, body := range []string{"1", "2"} {
			m := &amqp.Message{Properties: &amqp.MessageProperties{MessageID: id}, Data: [][]byte{[]byte(body)}}
			if body == "2" {
				m.ApplicationProperties = map[string]any{"trace": amqp.UUID{1}} // takes the way of TestRabbitRescue
			}
			publishForged(t, w, "ids", m)
			sink.await(t, fmt.Sprintf("%.40s is taken", want), func() bool { return string(sink.last[want].Data()) == body })
		}
	}
}

// TestRabbitTimeout: messages that a sink does not take in time go back into the queue, and come again by themselves.
func TestRabbitTimeout(t *testing.T) {
	t.Parallel() // RabbitMQ looks once a minute
	w := startRabbitMQ(t, local.Config("consumer_timeout = 1000"))
	w.create(t, "timeout")
	sink := record(t)
	open := make(chan struct{})
	sink.answer(func([]event.Event) (int, map[string]any) {
		<-open
		return 204, nil
	})
	src := w.open("timeout")
	deliver(t, src, sink.settings())
	all := reports("a", 10)
	w.publish(t, "timeout", all)
	for deadline := time.Now().Add(150 * time.Second); !strings.Contains(src.State(), "PRECONDITION_FAILED"); {
		if time.Now().After(deadline) {
			t.Fatal("RabbitMQ has not closed the channel")
		}
		time.Sleep(time.Millisecond)
	}
	close(open)
	sink.awaitAll(t, all)
	more := reports("b", 10)
	w.publish(t, "timeout", more)
	sink.awaitAll(t, more)
}

// TestRabbitLarge: messages that have far more bytes than may be held, while the sink takes none of them at first.
func TestRabbitLarge(t *testing.T) {
	w := startRabbitMQ(t)
	w.create(t, "large")
	var all []event.Event
	for i := range 60 {
		e := reports(fmt.Sprint("large-", i), 1)[0]
		e.DataEncoded = fmt.Appendf(nil, `{"country":"GT","weather":"Sunny","more":%q}`, strings.Repeat("x", 1<<20))
		all = append(all, e)
	}
	for part := range slices.Chunk(all, 10) {
		w.publish(t, "large", part)
	}
	sink := record(t)
	open := make(chan struct{})
	sink.answer(func([]event.Event) (int, map[string]any) {
		<-open
		return 204, nil
	})
	src := w.open("large").(*Rabbit)
	deliver(t, src, sink.settings())
	sink.await(t, "POSTs are under way", func() bool { return sink.tries >= posts })
	for range 50 {
		time.Sleep(20 * time.Millisecond)
		src.inbox.mu.Lock()
		waiting := src.inbox.bytes
		src.inbox.mu.Unlock()
		if waiting > connections*(windowBytes+2<<20) {
			t.Fatalf("%d bytes wait", waiting)
		}
	}
	close(open)
	sink.awaitAll(t, all)
}

// TestWindow reads frames in pieces of any size, and settles in any order.
func TestWindow(t *testing.T) {
	frame := func(kind byte, payload string) string {
		b := binary.BigEndian.AppendUint32([]byte{kind, 0, 1}, uint32(len(payload)))
		return string(b) + payload + "\xce"
	}
	message := frame(1, "\x00\x3c\x00\x3cdeliver") + frame(2, "header") + frame(3, "body") + frame(8, "")
	stream := frame(1, "\x00\x3c\x00\x15consume-ok") + strings.Repeat(message, 100)
	for _, piece := range []int{1, 2, 3, 5, 7, 11, 64, 1000, len(stream)} {
		w := newWindow(nil, 100)
		for p := range slices.Chunk([]byte(stream), piece) {
			w.follow(p)
		}
		if len(w.open) != 100 || w.held < 100*len("deliverheaderbody") || w.held > 100*len(message) {
			t.Fatalf("in pieces of %d: %d deliveries of %d bytes", piece, len(w.open), w.held)
		}
		for _, step := range []struct {
			settle []int64
			singly []uint64
			upTo   uint64
		}{
			{[]int64{1}, nil, 1},
			{[]int64{3, 4}, []uint64{3, 4}, 0},
			{[]int64{2}, nil, 2}, // 3 and 4 must not be acknowledged again
			{[]int64{6}, []uint64{6}, 0},
			{[]int64{7, 5}, nil, 7},
			{span(9, 28), nil, 0}, // too many for a frame each
			{[]int64{8}, nil, 28},
			{span(30, 78), nil, 0},
			{[]int64{80}, append(tags(30, 78), 80), 0}, // half of the prefetch
			{[]int64{29}, nil, 29},
			{span(81, 100), nil, 0},
			{[]int64{79}, nil, 100},
		} {
			singly, upTo := w.settle(step.settle)
			if !slices.Equal(singly, step.singly) || upTo != step.upTo {
				t.Fatalf("settling %v acknowledges %v and up to %d", step.settle, singly, upTo)
			}
		}
		if w.held != 0 || len(w.open) != 0 || w.pending != 0 {
			t.Fatalf("%d bytes, %d deliveries and %d acknowledgements are left", w.held, len(w.open), w.pending)
		}
	}
}

func span(from, to int64) (all []int64) {
	for ; from <= to; from++ {
		all = append(all, from)
	}
	return all
}

func tags(from, to uint64) (all []uint64) {
	for ; from <= to; from++ {
		all = append(all, from)
	}
	return all
}

// FuzzRead reads whatever may stand in a message.
func FuzzRead(f *testing.F) {
	for _, body := range []string{`{"specversion":"1.0","id":"m-1","source":"/s","type":"t","data":1}`, `{`, "", "0 ", asSequence, "\x00Sw\xa1\x04text", "\x00SwU\a", "\x00Sw"} {
		f.Add([]byte(body), event.ApplicationCloudEventsJSON, "", "m-1", "cloudEvents:id", "1")
		f.Add([]byte(body), "application/json", encodedBody, "", longMessageID, "m-2")
	}
	r := NewRabbit(RabbitSettings{Queue: "message"})
	f.Fuzz(func(t *testing.T, body []byte, contentType, typ, id, name, value string) {
		d := &amqp091.Delivery{
			ContentType: contentType, Type: typ, MessageId: id, Body: bytes.Clone(body),
			Headers: amqp091.Table{"cloudEvents:specversion": "1.0", "cloudEvents:source": "/s", "cloudEvents:type": "t", name: value},
		}
		e := r.read(d)
		if !jsontext.Value(e.JSON).IsValid() || jsontext.Value(e.JSON).Kind() != '{' {
			t.Fatalf("not one JSON object: %q", e.JSON)
		}
		if !bytes.Equal(d.Body, body) {
			t.Fatal("it has changed the message")
		}
		if e.Unreadable != nil {
			// What happens to be JSON loses the white space around it.
			if kept := events.Recover(e.JSON); !bytes.Equal(bytes.TrimSpace(kept.Data()), bytes.TrimSpace(body)) {
				t.Fatalf("the dead letter holds %q", kept.Data())
			}
			return
		}
		if typ == encodedBody || id == "" {
			return
		}
		m := &amqp.Message{
			Properties:            &amqp.MessageProperties{MessageID: id, ContentType: &contentType},
			ApplicationProperties: map[string]any(d.Headers), Data: [][]byte{body},
		}
		want, got := events.ReadMessage(m, r.source), events.Recover(e.JSON)
		if want.ID() != got.ID() && strings.TrimSpace(id) != "" && want.ID() == strings.ToValidUTF8(want.ID(), "") {
			t.Fatalf("it is %q, and not %q", got.ID(), want.ID())
		}
		if !bytes.Equal(want.Data(), got.Data()) && !jsontext.Value(want.Data()).IsValid() {
			t.Fatalf("its data is %q, and not %q", got.Data(), want.Data())
		}
	})
}
