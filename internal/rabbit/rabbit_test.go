package rabbit

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"

	"isobar.dev/config/local"
)

// nowhere is an address to which anything can be sent and which leads to no queue: RabbitMQ releases what comes.
const nowhere = "/exchanges/amq.direct/nowhere"

func message(text string) *amqp.Message {
	return &amqp.Message{Header: &amqp.MessageHeader{Durable: true}, Data: [][]byte{[]byte(text)}}
}

// sendTo sends one message over a connection of the client library.
func sendTo(t *testing.T, client *amqp.Client, address string) error {
	t.Helper()
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	link, err := session.NewSender(amqp.LinkTargetAddress(address), amqp.LinkDetachOnDispositionError(false))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return link.Send(ctx, message("x"))
}

func connected(t *testing.T, s *Sender) *Sender {
	t.Helper()
	t.Cleanup(s.Close)
	for deadline := time.Now().Add(20 * time.Second); s.Err() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(s.Err())
		}
	}
	return s
}

func send(s *Sender, timeout time.Duration, messages ...*amqp.Message) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return s.Send(ctx, messages...)
}

func TestRabbitMQ(t *testing.T) {
	server := local.StartRabbitMQ(t)
	settings := Settings{Addr: server.Addr(), Username: local.RabbitUser, Password: local.RabbitPassword}

	t.Run("the library's fault: it takes a released message for sent", func(t *testing.T) {
		client, err := amqp.Dial("amqp://"+settings.Addr, amqp.ConnSASLPlain(settings.Username, settings.Password))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if err := sendTo(t, client, nowhere); err != nil {
			t.Errorf("it says %v: wire.go is needed no more", err)
		}
	})
	t.Run("over our connection it is an error", func(t *testing.T) {
		conn, err := Dial(t.Context(), settings)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := sendTo(t, conn.Client, nowhere); err == nil {
			t.Error("a message that RabbitMQ has released is taken for sent")
		}
		if err := sendTo(t, conn.Client, Queue("message")); err != nil {
			t.Errorf("one that it has stored is not: %v", err)
		}
	})
	t.Run("Send says that a released message is not stored", func(t *testing.T) {
		s := connected(t, newSender(settings, "nowhere", nowhere))
		for range 2 { // the link lives on
			if err := send(s, 10*time.Second, message("a"), message("b")); !errors.Is(err, ErrNotStored) {
				t.Errorf("the error is %v", err)
			}
		}
		if err := s.Err(); err != nil {
			t.Errorf("the connection is gone: %v", err)
		}
	})
	t.Run("Send of many at once", func(t *testing.T) {
		s := connected(t, NewSender(settings, "message"))
		var sending sync.WaitGroup
		for range 20 {
			sending.Go(func() {
				var all []*amqp.Message
				for range 100 {
					all = append(all, message("x"))
				}
				if err := send(s, 20*time.Second, all...); err != nil {
					t.Error(err)
				}
			})
		}
		sending.Wait()
		if err := send(s, time.Second); err != nil {
			t.Errorf("of none: %v", err)
		}
	})
	t.Run("a wrong password is said, with the user and the address", func(t *testing.T) {
		wrong := settings
		wrong.Username, wrong.Password = local.RabbitUser, "secret"
		_, err := Dial(t.Context(), wrong)
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte(settings.Addr)) || !bytes.Contains([]byte(err.Error()), []byte(`"guest"`)) || bytes.Contains([]byte(err.Error()), []byte("secret")) {
			t.Errorf("the error is %v", err)
		}
	})
	t.Run("a queue that is not there is said", func(t *testing.T) {
		s := NewSender(settings, "missing")
		defer s.Close()
		for deadline := time.Now().Add(20 * time.Second); !bytes.Contains([]byte(s.Err().Error()), []byte(`queue "missing"`)); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(s.Err())
			}
		}
		if err := send(s, time.Second, message("x")); !errors.Is(err, ErrAway) {
			t.Errorf("the error is %v", err)
		}
	})
	t.Run("a link without outcomes is given up although its connection lives", func(t *testing.T) {
		p := swallow(t, settings.Addr)
		through := settings
		through.Addr = p.addr
		s := connected(t, NewSender(through, "message"))
		if err := send(s, 10*time.Second, message("x")); err != nil {
			t.Fatal(err)
		}
		p.swallows.Store(true)
		time.Sleep(stall) // as long as there was no outcome before
		if err := send(s, stall+200*time.Millisecond, message("x")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without an outcome the error is %v", err)
		}
		for deadline := time.Now().Add(5 * time.Second); p.connections.Load() < 2; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it does not connect again")
			}
		}
		p.swallows.Store(false)
		connected(t, s)
		if err := send(s, 10*time.Second, message("x")); err != nil {
			t.Errorf("over the new connection: %v", err)
		}
	})
}

// swallower forwards connections, but for the dispositions of the server while it swallows.
type swallower struct {
	addr        string
	swallows    atomic.Bool
	connections atomic.Int64
}

func swallow(t *testing.T, target string) *swallower {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &swallower{addr: l.Addr().String()}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.connections.Add(1)
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				continue
			}
			go func() { _, _ = io.Copy(server, client); server.Close() }()
			go func() { p.frames(client, server); client.Close() }()
		}
	}()
	return p
}

func (p *swallower) frames(client io.Writer, server io.Reader) {
	head := make([]byte, 8)
	for {
		if _, err := io.ReadFull(server, head); err != nil {
			return
		}
		var body []byte
		if string(head[:4]) != "AMQP" {
			body = make([]byte, binary.BigEndian.Uint32(head)-8)
			if _, err := io.ReadFull(server, body); err != nil {
				return
			}
		}
		if p.swallows.Load() && len(body) > 2 && body[2] == disposition {
			continue
		}
		if _, err := client.Write(append(bytes.Clone(head), body...)); err != nil {
			return
		}
	}
}

// TestCloseOnADeafServer: a server that takes the connection and says nothing does not hold up Close, nor who dials.
func TestCloseOnADeafServer(t *testing.T) {
	settings := Settings{Addr: deaf(t).Addr().String(), Username: "guest", Password: "guest"}
	s := NewSender(settings, "message")
	time.Sleep(10 * time.Millisecond) // it dials
	start := time.Now()
	s.Close()
	if took := time.Since(start); took > lastWrite+time.Second {
		t.Errorf("Close took %v", took)
	}
	if err := send(s, time.Second, message("x")); !errors.Is(err, ErrAway) {
		t.Errorf("after Close: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start = time.Now()
	if _, err := Dial(ctx, settings); err == nil || time.Since(start) > lastWrite+time.Second {
		t.Errorf("Dial took %v: %v", time.Since(start), err)
	}
}
