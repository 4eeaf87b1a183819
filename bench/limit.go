package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	amqp "github.com/Azure/go-amqp"

	"isobar.dev/config/local"
	"isobar.dev/events"
	"isobar.dev/internal/rabbit"
)

// A bare client publishes to and accepts from the queue, with as many messages in flight as pays: what RabbitMQ can do
// when nothing else runs.
const (
	bareLinks    = 4
	bareInFlight = 256
)

// bare opens a connection of the AMQP client as it comes, or, gathering, as Isobar uses it: internal/rabbit gathers the
// writes, which makes both sides of it faster.
func (b *bench) bare(gathering bool) (session func(...amqp.SessionOption) (*amqp.Session, error), end func(), err error) {
	addr := b.system.Addr("rabbitmq")
	if gathering {
		conn, err := rabbit.Dial(b.ctx, rabbit.Settings{Addr: addr, Username: local.RabbitUser, Password: local.RabbitPassword})
		if err != nil {
			return nil, nil, err
		}
		return conn.NewSession, conn.Close, nil
	}
	conn, err := amqp.Dial("amqp://"+addr, amqp.ConnSASLPlain(local.RabbitUser, local.RabbitPassword), amqp.ConnServerHostname("vhost:/"))
	if err != nil {
		return nil, nil, err
	}
	return conn.NewSession, func() { conn.Close() }, nil
}

// limit measures the bare client with the source at rest.
func (b *bench) limit(part string) (err error) {
	resume, err := b.rest(local.RabbitMQSource)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resume()) }()
	n := *backlog / 2
	publish, err := b.barePublish(n, false)
	if err != nil {
		return err
	}
	b.add(part, "publishing alone", publish, "messages/s", "")
	accept, err := b.bareAccept(n)
	if err != nil {
		return err
	}
	b.add(part, "accepting alone", accept, "messages/s", "")
	for _, gathering := range []bool{false, true} {
		start := time.Now()
		published := make(chan error, 1)
		go func() {
			_, err := b.barePublish(n, gathering)
			published <- err
		}()
		if _, err := b.bareAccept(n); err != nil {
			return err
		}
		took := time.Since(start) - settling
		if err := <-published; err != nil {
			return err
		}
		what := "both at once"
		if gathering {
			what += ", gathering writes"
		}
		b.add(part, what, float64(n)/took.Seconds(), "messages/s", "")
	}
	return nil
}

// rest stops processes and returns what starts them again.
func (b *bench) rest(names ...string) (resume func() error, err error) {
	ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
	defer cancel()
	for _, name := range names {
		if err := b.system.Process(name).Stop(ctx); err != nil {
			return nil, err
		}
	}
	return func() error {
		for _, name := range names {
			if err := b.system.Process(name).Start(b.ctx); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// barePublish publishes n messages like those of the road and returns how many a second.
func (b *bench) barePublish(n int, gathering bool) (float64, error) {
	open, end, err := b.bare(gathering)
	if err != nil {
		return 0, err
	}
	defer end()
	r, err := events.ParseReport([]byte(report))
	if err != nil {
		return 0, err
	}
	start := time.Now()
	var sending sync.WaitGroup
	errs := make(chan error, bareLinks*bareInFlight)
	for i := range bareLinks {
		session, err := open()
		if err != nil {
			return 0, err
		}
		link, err := session.NewSender(amqp.LinkTargetAddress(rabbit.Queue("message")))
		if err != nil {
			return 0, err
		}
		for j := range bareInFlight {
			sending.Go(func() {
				for k := i*bareInFlight + j; k < n; k += bareLinks * bareInFlight {
					e := events.New(r, fmt.Sprintf("0193b3f0-7a1b-7c3d-%016d", k), start)
					ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
					err := link.Send(ctx, events.WriteMessage(&e))
					cancel()
					if err != nil {
						errs <- err
						return
					}
				}
			})
		}
	}
	sending.Wait()
	select {
	case err := <-errs:
		return 0, err
	default:
		return float64(n) / time.Since(start).Seconds(), nil
	}
}

// bareAccept accepts n messages and returns how many a second.
func (b *bench) bareAccept(n int) (float64, error) {
	open, end, err := b.bare(false)
	if err != nil {
		return 0, err
	}
	defer end()
	session, err := open()
	if err != nil {
		return 0, err
	}
	link, err := session.NewReceiver(amqp.LinkSourceAddress(rabbit.Queue("message")),
		amqp.LinkCredit(2000), amqp.LinkBatching(true), amqp.LinkBatchMaxAge(5*time.Millisecond))
	if err != nil {
		return 0, err
	}
	start := time.Now()
	for range n {
		ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
		_, err := link.Receive(ctx)
		cancel()
		if err != nil {
			return 0, err
		}
	}
	rate := float64(n) / time.Since(start).Seconds()
	// The last acceptances are still on their way; nothing may be left for the source.
	for {
		ctx, cancel := context.WithTimeout(b.ctx, settling)
		_, err := link.Receive(ctx)
		cancel()
		if err != nil {
			return rate, b.ctx.Err()
		}
	}
}

// drain measures each source with a backlog, and the bare client with one of the same size.
func (b *bench) drain() error {
	if _, err := b.rest(local.RabbitMQSource, local.KafkaSource); err != nil {
		return err
	}
	before, err := b.stores.total(b.ctx, "redis")
	if err != nil {
		return err
	}
	if err := b.fill(*backlog); err != nil {
		return err
	}
	var rates [2]float64
	for i, one := range []struct{ source, store string }{{local.RabbitMQSource, "valkey"}, {local.KafkaSource, "redis"}} {
		start := time.Now()
		if err := b.system.Process(one.source).Start(b.ctx); err != nil {
			return err
		}
		if err := b.stores.await(b.ctx, one.store, before+*backlog); err != nil {
			return err
		}
		rates[i] = float64(*backlog) / time.Since(start).Seconds()
	}
	resume, err := b.rest(local.RabbitMQSource)
	if err != nil {
		return err
	}
	if _, err := b.barePublish(*backlog, false); err != nil {
		return err
	}
	bare, err := b.bareAccept(*backlog)
	if err != nil {
		return err
	}
	b.add("drain", "RabbitMQ by a bare client", bare, "messages/s", "")
	b.add("drain", "RabbitMQ to Valkey", rates[0], "reports/s", fmt.Sprintf("≥ %.0f, 0.6 of the bare client's", 0.6*bare))
	b.add("drain", "Kafka to Redis", rates[1], "reports/s", fmt.Sprintf("≥ %.0f, 3 of RabbitMQ's", 3*rates[0]))
	return resume()
}

// fill posts n reports through the ingress.
func (b *bench) fill(n int) error {
	const size = 1000
	body := "[" + strings.Repeat(report+",", size-1) + report + "]"
	var posting sync.WaitGroup
	next := make(chan int)
	errs := make(chan error, 8)
	for range 8 {
		posting.Go(func() {
			for i := range next {
				for { // under the same key until it is taken
					if done, err := b.post(body, fmt.Sprintf("fill-%d-%d", time.Now().YearDay(), i)); err != nil {
						errs <- err
						return
					} else if done {
						break
					}
				}
			}
		})
	}
	for i := range n / size {
		select {
		case next <- i:
		case err := <-errs:
			return err
		}
	}
	close(next)
	posting.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}
