package source

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	amqp091 "github.com/rabbitmq/amqp091-go"

	"isobar.dev/internal/rabbit"
)

const (
	// connectTimeout bounds each step of making a connection to RabbitMQ.
	connectTimeout = 5 * time.Second
	// silence is after how long a broker that sends nothing is taken for dead; it is to be heard of in half of it.
	silence   = 10 * time.Second
	frameSize = 128 << 10 // RabbitMQ's own limit
	// goodbye bounds the wait for the broker's.
	goodbye = time.Second
)

// deliveries is the stream of one connection, with one channel and one consumer.
type deliveries struct {
	conn    *amqp091.Connection
	channel *amqp091.Channel
	window  *window
	closed  atomic.Bool

	acking sync.Mutex // so that acknowledgements leave in the order of what they cover
}

// open connects. close must be called whatever it returns.
func (d *deliveries) open(ctx context.Context, s rabbit.Settings, most int) error {
	wrong := fmt.Sprintf("connect to RabbitMQ at %s as user %q", s.Addr, s.Username)
	wire, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp", s.Addr)
	if err != nil {
		return fmt.Errorf("%s: %w", wrong, err)
	}
	_ = wire.SetDeadline(time.Now().Add(connectTimeout))
	properties := amqp091.NewConnectionProperties()
	properties.SetClientConnectionName("isobar-source")
	d.window = newWindow(wire, most)
	conn, err := amqp091.Open(d.window, amqp091.Config{
		SASL:       []amqp091.Authentication{&amqp091.PlainAuth{Username: s.Username, Password: s.Password}},
		Vhost:      "/",
		FrameSize:  frameSize,
		Heartbeat:  silence,
		Locale:     "en_US",
		Properties: properties,
	})
	if err != nil {
		wire.Close()
		return fmt.Errorf("%s: %w", wrong, err)
	}
	d.conn = conn
	d.window.watch()
	if d.channel, err = conn.Channel(); err != nil {
		return fmt.Errorf("open a channel to RabbitMQ: %w", err)
	}
	if err := d.channel.Qos(most, 0, false); err != nil {
		return fmt.Errorf("set the prefetch to %d: %w", most, err)
	}
	return nil
}

func (d *deliveries) close() {
	if d.conn == nil || d.closed.Swap(true) {
		return
	}
	d.window.end()
	late := time.AfterFunc(goodbye, func() { d.window.conn.Close() })
	defer late.Stop()
	_ = d.conn.Close() // what is not acknowledged goes back into the queue
}

func (d *deliveries) takes(int64) bool { return !d.closed.Load() }

func (d *deliveries) settles(at []int64) {
	d.acking.Lock()
	defer d.acking.Unlock()
	singly, upTo := d.window.settle(at)
	var err error
	for _, tag := range singly {
		if err == nil {
			err = d.channel.Ack(tag, false)
		}
	}
	if upTo > 0 && err == nil {
		err = d.channel.Ack(upTo, true)
	}
	if err != nil && !d.closed.Load() {
		d.closed.Store(true)
		d.window.Close() // they come again over another connection
	}
}
