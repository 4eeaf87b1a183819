package link

import (
	"bytes"
	"net"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
)

func TestSplit(t *testing.T) {
	contentType := "application/cloudevents+json"
	for name, c := range map[string]struct {
		message amqp.Message
		want    Sections
	}{
		"one data section": {
			amqp.Message{
				Header:                &amqp.MessageHeader{Durable: true, DeliveryCount: 3},
				Annotations:           amqp.Annotations{"x-opt": "1"},
				Properties:            &amqp.MessageProperties{MessageID: "id", ContentType: &contentType},
				ApplicationProperties: map[string]any{"a": int32(1)},
				Data:                  [][]byte{[]byte("body")},
				Footer:                amqp.Annotations{"x-end": "1"},
			},
			Sections{ID: "id", ContentType: []byte(contentType), Data: []byte("body"), Body: true},
		},
		"a long one":             {amqp.Message{Data: [][]byte{bytes.Repeat([]byte("x"), 300)}}, Sections{Data: bytes.Repeat([]byte("x"), 300), Body: true}},
		"an empty one":           {amqp.Message{Data: [][]byte{{}}}, Sections{Data: []byte{}, Body: true}},
		"two data sections":      {amqp.Message{Data: [][]byte{[]byte("a"), []byte("b")}}, Sections{Data: []byte("b")}},
		"a value":                {amqp.Message{Value: "text"}, Sections{}},
		"an id that is a number": {amqp.Message{Properties: &amqp.MessageProperties{MessageID: uint64(1)}}, Sections{}},
		"nothing":                {amqp.Message{}, Sections{}},
	} {
		t.Run(name, func(t *testing.T) {
			encoded, err := c.message.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			got, err := Split(encoded)
			if err != nil {
				t.Fatal(err)
			}
			if got.ID != c.want.ID || got.Body != c.want.Body || !bytes.Equal(got.Data, c.want.Data) ||
				!bytes.Equal(got.ContentType, c.want.ContentType) {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestValues(t *testing.T) {
	list := appendList(nil, performOpen, 4, func(b []byte) []byte {
		b = appendString(b, "é")
		b = appendUint(b, 1<<31)
		b = append(b, codeTrue)
		return appendBinary(b, []byte{0})
	})
	r := reader{b: list}
	descriptor, v := r.described()
	fields := make([]value, 6)
	if err := v.fields(fields); err != nil || descriptor != performOpen || len(r.b) != 0 {
		t.Fatal(err, descriptor, r.b)
	}
	if string(fields[0].text()) != "é" || fields[1].uint() != 1<<31 || !fields[2].is() || len(fields[3].text()) != 1 ||
		!fields[4].null() || !fields[5].null() {
		t.Errorf("got %v", fields)
	}
}

// TestAllowed: what may come is bounded by what is held, and a message that has begun can always end.
func TestAllowed(t *testing.T) {
	for name, c := range map[string]struct {
		link     *Link
		frames   serial
		messages serial
	}{
		"nothing held":                          {&Link{}, Window, Window},
		"numbers that wrap around":              {&Link{frames: 1<<32 - 1, messages: 1<<32 - 1}, Window - 1, Window - 1},
		"all messages held":                     {&Link{held: Window, received: Window}, 0, 0},
		"half of them settled":                  {&Link{held: Window / 2, received: Window, settled: Window / 2}, Window / 2, Window / 2},
		"few large messages hold all frames":    {&Link{held: Window + 5, received: 3}, 0, Window - 3},
		"all frames held and one message begun": {&Link{held: Window + 5, received: 3, pieces: 2}, Window / 4, Window - 3},
	} {
		t.Run(name, func(t *testing.T) {
			if frames, messages := c.link.allowed(); frames != c.frames || messages != c.messages {
				t.Errorf("got %d frames and %d messages, want %d and %d", frames, messages, c.frames, c.messages)
			}
		})
	}
}

func FuzzSplit(f *testing.F) {
	f.Add([]byte("\x00\x53\x75\xa0\x01x"))
	f.Add([]byte("\x00\x53\x73\xc0\x04\x01\xa1\x01x"))
	f.Add([]byte("\x00\x53\x73\xd0\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, message []byte) {
		s, err := Split(message)
		if err != nil && s.Body {
			t.Fatal("a body of what is not well-formed")
		}
		if len(s.Data) > len(message) {
			t.Fatal("more data than there is")
		}
	})
}

// FuzzTransfer takes frames that a broker may send.
func FuzzTransfer(f *testing.F) {
	f.Add([]byte("\x00\x53\x14\xc0\x06\x05\x43\x43\xa0\x01x\x43payload"))
	f.Add([]byte("\x00\x53\x16\xc0\x10\x03\x43\x41\x00\x53\x1d\xc0\x08\x02\xa3\x01x\xa1\x01y"))
	f.Add([]byte("\x00\x53\x13\x45"))
	f.Fuzz(func(t *testing.T, body []byte) {
		l := &Link{large: map[uint32]int{}, conn: nowhere{}}
		r := reader{b: body}
		performative, list := r.described()
		if r.err != nil {
			return
		}
		if performative == performTransfer {
			_, message, err := l.transfer(list, r.b)
			if err == nil && len(message) > len(body) {
				t.Fatal("more message than there is")
			}
			return
		}
		_ = l.other(performative, list)
	})
}

// nowhere is a connection that takes everything.
type nowhere struct{ net.Conn }

func (nowhere) Write(p []byte) (int, error)      { return len(p), nil }
func (nowhere) SetWriteDeadline(time.Time) error { return nil }
