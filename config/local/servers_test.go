package local

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	goredis "github.com/redis/go-redis/v9"

	"isobar.dev/internal/authority"
)

// kept is a server, and how to put something into it and see it there.
type kept struct {
	start func(testing.TB, ...Option) *Process
	put   func(t *testing.T, addr, what string)
	has   func(t *testing.T, addr, what string)
}

var servers = map[Kind]kept{
	KafkaKind:    {StartKafka, putKafka, hasKafka},
	RabbitMQKind: {StartRabbitMQ, putRabbit, hasRabbit},
	RedisKind:    {StartRedis, putRedis, hasRedis},
	ValkeyKind:   {StartValkey, putRedis, hasRedis},
}

func TestServer(t *testing.T) {
	for kind, server := range servers {
		t.Run(string(kind), func(t *testing.T) {
			cert, key := authority.New(t).Sign(t, loopback, time.Now().Add(time.Hour))
			secure, err := FreePort()
			if err != nil {
				t.Fatal(err)
			}
			p := server.start(t, TLS(secure, cert, key))
			addr, pid := p.Addr(), p.Pid()
			server.put(t, addr, "promised")

			t.Run("listens on loopback only, with TLS too", func(t *testing.T) {
				await(t, "it listens", func() bool { return connects(t.Context(), net.JoinHostPort(loopback, strconv.Itoa(secure))) == nil })
				onLoopback(t, p)
			})
			t.Run("has what it confirmed after it was killed and started again", func(t *testing.T) {
				if err := p.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				if p.Addr() != addr || p.Pid() == pid {
					t.Errorf("at %s as %d, was at %s as %d", p.Addr(), p.Pid(), addr, pid)
				}
				server.has(t, addr, "promised")
			})
			server.put(t, addr, "promised")
			t.Run("stops by itself and leaves nothing", func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				if err := p.Stop(ctx); err != nil {
					t.Fatal(err)
				}
				if left := tagged(p.run.tag); len(left) > 0 {
					t.Errorf("processes %v are left", left)
				}
				if err := portFree(addr); err != nil {
					t.Error(err)
				}
			})
			t.Run("has it after it was stopped and started again", func(t *testing.T) {
				if err := p.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				server.has(t, addr, "promised")
			})
		})
	}
}

// onLoopback looks at the sockets of the process and of all that it has started.
func onLoopback(t *testing.T, p *Process) {
	t.Helper()
	found := 0
	for _, l := range listeners() {
		for _, pid := range tagged(p.run.tag) {
			if !holds(pid, l.inode) {
				continue
			}
			found++
			if !l.ip.IsLoopback() && l.ip.String() != "::ffff:127.0.0.1" {
				t.Errorf("process %d listens on %s:%d", pid, l.ip, l.port)
			}
			if l.port == 4369 {
				t.Errorf("process %d is an epmd", pid)
			}
		}
	}
	if found == 0 {
		t.Error("it listens nowhere")
	}
}

func holds(pid int, inode string) bool {
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); to == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}

func TestTwoOfAKindRunAtOnce(t *testing.T) {
	for kind, server := range servers {
		t.Run(string(kind), func(t *testing.T) {
			a, b := server.start(t), server.start(t)
			server.put(t, a.Addr(), "a")
			server.put(t, b.Addr(), "b")
			server.has(t, a.Addr(), "a")
			server.has(t, b.Addr(), "b")
		})
	}
}

func TestOnAnotherAddressWithALogin(t *testing.T) {
	refused := map[Kind]func(addr string) error{
		KafkaKind: nil, // it has no login
		RabbitMQKind: func(addr string) error {
			c, err := amqp.Dial("amqp://"+addr, amqp.ConnSASLPlain(RabbitUser, RabbitPassword))
			if err == nil {
				c.Close()
			}
			return err
		},
		RedisKind:  func(addr string) error { return pingRedis(t, &goredis.Options{Addr: addr}) },
		ValkeyKind: func(addr string) error { return pingRedis(t, &goredis.Options{Addr: addr}) },
	}
	for kind, server := range servers {
		t.Run(string(kind), func(t *testing.T) {
			p := server.start(t, On("127.0.0.2"), Login("operator", "secret")) // ready: it takes the login
			host, port, err := net.SplitHostPort(p.Addr())
			if err != nil || host != "127.0.0.2" {
				t.Errorf("it is at %s", p.Addr())
			}
			if connects(t.Context(), net.JoinHostPort(loopback, port)) == nil {
				t.Error("it is on 127.0.0.1 too")
			}
			if without := refused[kind]; without != nil && without(p.Addr()) == nil {
				t.Error("it takes who has no login")
			}
			if kind == RedisKind || kind == ValkeyKind {
				if err := pingRedis(t, &goredis.Options{Addr: p.Addr(), Username: "operator", Password: "secret"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func pingRedis(t *testing.T, options *goredis.Options) error {
	c := goredis.NewClient(options)
	defer c.Close()
	return c.Ping(t.Context()).Err()
}

func TestRabbitMQ(t *testing.T) {
	web, err := FreePort()
	if err != nil {
		t.Fatal(err)
	}
	p := StartRabbitMQ(t, Management(web))

	t.Run("listens on loopback only, its management too", func(t *testing.T) {
		await(t, "management answers", func() bool {
			return connects(t.Context(), net.JoinHostPort(loopback, strconv.Itoa(web))) == nil
		})
		onLoopback(t, p)
	})
	get := func(t *testing.T, queue, then string) {
		t.Helper()
		// The management plugin takes a message out and then does with it what it is told.
		body := fmt.Sprintf(`{"count": 1, "encoding": "auto", "ackmode": %q}`, then)
		url := fmt.Sprintf("http://%s:%d/api/queues/%%2F/%s/get", loopback, web, queue)
		await(t, "a message is in "+queue, func() bool {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			r.SetBasicAuth(RabbitUser, RabbitPassword)
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			b, err := io.ReadAll(answer.Body)
			if err != nil || answer.StatusCode != http.StatusOK {
				t.Fatalf("%s: %s: %s, %v", url, answer.Status, b, err)
			}
			return strings.Contains(string(b), "patience")
		})
	}
	t.Run("delivers a message again however often it failed", func(t *testing.T) {
		putRabbit(t, p.Addr(), "patience")
		for range 50 {
			get(t, "message", "reject_requeue_true")
		}
	})
	t.Run("keeps a rejected message in message.dead", func(t *testing.T) {
		get(t, "message", "reject_requeue_false")
		get(t, "message.dead", "ack_requeue_false")
	})
}

func TestRedisFailsOver(t *testing.T) {
	master := StartRedis(t)
	replica := StartRedis(t, Named("replica"), ReplicaOf(master.Addr()))
	sentinel := StartSentinel(t, "weather", master.Addr())
	putRedis(t, master.Addr(), "promised")

	watcher := goredis.NewSentinelClient(&goredis.Options{Addr: sentinel.Addr()})
	defer func() { _ = watcher.Close() }()
	await(t, "the sentinel knows the replica", func() bool {
		all, err := watcher.Replicas(t.Context(), "weather").Result()
		return err == nil && len(all) == 1
	})
	await(t, "the replica has the data", func() bool {
		c := goredis.NewClient(&goredis.Options{Addr: replica.Addr()})
		defer c.Close()
		return c.Exists(t.Context(), "promised").Val() == 1
	})
	if err := master.Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, "the replica is the master", func() bool {
		addr, err := watcher.GetMasterAddrByName(t.Context(), "weather").Result()
		return err == nil && strings.Join(addr, ":") == replica.Addr()
	})
	hasRedis(t, replica.Addr(), "promised")

	// What it was promoted to outlives it.
	if err := replica.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	putRedis(t, replica.Addr(), "after")
	hasRedis(t, replica.Addr(), "after")
}

func putRedis(t *testing.T, addr, what string) {
	t.Helper()
	c := goredis.NewClient(&goredis.Options{Addr: addr})
	defer c.Close()
	if err := c.Set(t.Context(), what, what, 0).Err(); err != nil {
		t.Fatal(err)
	}
}

func hasRedis(t *testing.T, addr, what string) {
	t.Helper()
	c := goredis.NewClient(&goredis.Options{Addr: addr})
	defer c.Close()
	if got, err := c.Get(t.Context(), what).Result(); err != nil || got != what {
		t.Fatalf("it has %q, %v; want %q", got, err, what)
	}
}

func kafkaConfig() *sarama.Config {
	c := sarama.NewConfig()
	c.Version = sarama.V4_0_0_0
	c.Producer.RequiredAcks = sarama.WaitForAll
	c.Producer.Return.Successes = true
	return c
}

func putKafka(t *testing.T, addr, what string) {
	t.Helper()
	p, err := sarama.NewSyncProducer([]string{addr}, kafkaConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	_, _, err = p.SendMessage(&sarama.ProducerMessage{Topic: "message.dead", Value: sarama.StringEncoder(what)})
	if err != nil {
		t.Fatal(err)
	}
}

func hasKafka(t *testing.T, addr, what string) {
	t.Helper()
	c, err := sarama.NewConsumer([]string{addr}, kafkaConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p, err := c.ConsumePartition("message.dead", 0, sarama.OffsetOldest)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	select {
	case m := <-p.Messages():
		if string(m.Value) != what {
			t.Fatalf("it has %q, want %q", m.Value, what)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it has nothing")
	}
}

func rabbitSession(t *testing.T, addr string) *amqp.Session {
	t.Helper()
	c, err := amqp.Dial("amqp://"+addr, amqp.ConnSASLPlain(RabbitUser, RabbitPassword))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func putRabbit(t *testing.T, addr, what string) {
	t.Helper()
	sender, err := rabbitSession(t, addr).NewSender(amqp.LinkTargetAddress("/queues/message"))
	if err != nil {
		t.Fatal(err)
	}
	m := amqp.NewMessage([]byte(what))
	m.Header = &amqp.MessageHeader{Durable: true}
	if err := sender.Send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
}

// hasRabbit takes it out.
func hasRabbit(t *testing.T, addr, what string) {
	t.Helper()
	receiver, err := rabbitSession(t, addr).NewReceiver(amqp.LinkSourceAddress("/queues/message"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	m, err := receiver.Receive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if string(m.GetData()) != what {
		t.Fatalf("it has %q, want %q", m.GetData(), what)
	}
	if err := receiver.Close(ctx); err != nil { // else it would be given the next one
		t.Fatal(err)
	}
}
