// Package e2e proves what Isobar promises, on the whole of it: real servers, real programs, real faults.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
	"isobar.dev/internal/rabbit"
)

// system is the one system of this package's tests, started by the first that asks for it.
var system struct {
	once sync.Once
	dir  string
	err  error
	*local.System
}

func TestMain(m *testing.M) {
	code := m.Run()
	if system.System != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if err := system.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "stop the system:", err)
			code = 1
		}
		cancel()
		if code == 0 {
			os.RemoveAll(system.dir)
		} else {
			fmt.Fprintln(os.Stderr, "the logs are in", system.dir)
		}
	}
	os.Exit(code)
}

// running returns the system with everything up and the stores empty.
func running(t *testing.T) *local.System {
	t.Helper()
	system.once.Do(func() {
		if system.dir, system.err = os.MkdirTemp("", "isobar-e2e-"); system.err != nil {
			return
		}
		var s *local.System
		if s, system.err = local.NewSystem(system.dir, local.Options{}); system.err != nil {
			return
		}
		if system.err = s.Start(context.Background(), os.Stderr); system.err == nil {
			system.System = s
		}
	})
	if system.err != nil {
		t.Fatal(system.err)
	}
	for _, p := range system.Processes() {
		if p.Pid() == 0 {
			start(t, p)
		}
	}
	for _, store := range stores(t, system.System) {
		if err := store.FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
	}
	return system.System
}

func start(t *testing.T, p *local.Process) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	if err := p.Start(ctx); err != nil {
		t.Fatalf("%v\n%s", err, local.Tail(p.Log(), 30))
	}
}

func kill(t *testing.T, p *local.Process) {
	t.Helper()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
}

// stores are clients of both stores, by name.
func stores(t *testing.T, s *local.System) map[string]*redis.Client {
	clients := map[string]*redis.Client{}
	for _, name := range []string{"redis", "valkey"} {
		c := redis.NewClient(&redis.Options{Addr: s.Addr(name), MaxRetries: 10})
		t.Cleanup(func() { c.Close() })
		clients[name] = c
	}
	return clients
}

// counts is all that a store says of the reports.
type counts struct {
	total     int
	countries map[string]int
	weather   map[string]int
}

func (c counts) equal(d counts) bool {
	return c.total == d.total && maps.Equal(c.countries, d.countries) && maps.Equal(c.weather, d.weather)
}

func read(ctx context.Context, store *redis.Client) (counts, error) {
	c := counts{countries: map[string]int{}, weather: map[string]int{}}
	total, err := store.Get(ctx, "messages:total").Int()
	if err != nil && !errors.Is(err, redis.Nil) {
		return c, err
	}
	c.total = total
	for key, into := range map[string]map[string]int{"country:counts": c.countries, "weather:counts": c.weather} {
		fields, err := store.HGetAll(ctx, key).Result()
		if err != nil {
			return c, err
		}
		for field, n := range fields {
			if into[field], err = strconv.Atoi(n); err != nil {
				return c, err
			}
		}
	}
	return c, nil
}

// counted waits until both stores say exactly what is wanted.
func counted(t *testing.T, s *local.System, want counts) {
	t.Helper()
	for name, store := range stores(t, s) {
		var got counts
		var err error
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			if got, err = read(t.Context(), store); err == nil && got.equal(want) {
				break
			}
			if time.Now().After(deadline) || got.total > want.total {
				t.Fatalf("%s has counted %+v, want %+v (%v)", name, got, want, err)
			}
		}
	}
}

// sunnyInGT are the counts of n reports like the README's.
func sunnyInGT(n int) counts {
	return counts{n, map[string]int{"GT": n}, map[string]int{"Sunny": n}}
}

// answer is what the ingress said.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// ids are those that the answer names.
func (a answer) ids(t *testing.T) []string {
	t.Helper()
	var document struct{ Reports []struct{ Source, ID string } }
	if err := json.Unmarshal(a.body, &document); err != nil {
		t.Fatalf("%s: %v", a.body, err)
	}
	var ids []string
	for _, r := range document.Reports {
		if r.Source == "" {
			t.Errorf("no source in %s", a.body)
		}
		ids = append(ids, r.ID)
	}
	return ids
}

var client = &http.Client{
	Timeout:   30 * time.Second,
	Transport: &http.Transport{MaxIdleConnsPerHost: 100},
}

func post(ctx context.Context, url, body string, header ...string) (answer, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader([]byte(body)))
	if err != nil {
		return answer{}, err
	}
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	response, err := client.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	said, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, said}, err
}

// posted posts and expects a status.
func posted(t *testing.T, status int, url, body string, header ...string) answer {
	t.Helper()
	a, err := post(t.Context(), url, body, header...)
	if err != nil {
		t.Fatal(err)
	}
	if a.status != status {
		t.Fatalf("%s is answered %d %s, want %d", body, a.status, a.body, status)
	}
	return a
}

// insist posts until it is answered 202.
func insist(ctx context.Context, url, body string, header ...string) error {
	for {
		a, err := post(ctx, url, body, header...)
		if err == nil && a.status == http.StatusAccepted {
			return nil
		}
		if err == nil && a.status < 500 && a.status != http.StatusTooManyRequests {
			return fmt.Errorf("%d %s", a.status, a.body)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %d %s %w", ctx.Err(), a.status, a.body, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func kafkaClient(t *testing.T, s *local.System) sarama.Client {
	t.Helper()
	c := sarama.NewConfig()
	c.Version = sarama.V3_0_0_0
	c.Producer.Return.Successes = true
	client, err := sarama.NewClient([]string{s.Addr("kafka")}, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// records reads a topic from the offsets given to its end.
func records(t *testing.T, client sarama.Client, topic string, from map[int32]int64) []*sarama.ConsumerMessage {
	t.Helper()
	consumer, err := sarama.NewConsumerFromClient(client)
	if err != nil {
		t.Fatal(err)
	}
	defer consumer.Close()
	var all []*sarama.ConsumerMessage
	for partition, end := range ends(t, client, topic) {
		if end <= from[partition] {
			continue
		}
		p, err := consumer.ConsumePartition(topic, partition, from[partition])
		if err != nil {
			t.Fatal(err)
		}
		for at := from[partition]; at < end; {
			select {
			case record := <-p.Messages():
				all = append(all, record)
				at = record.Offset + 1
			case <-time.After(20 * time.Second):
				t.Fatalf("partition %d of %s: nothing at offset %d, of %d", partition, topic, at, end)
			}
		}
		p.Close()
	}
	return all
}

// ends are the offsets after the last record of each partition.
func ends(t *testing.T, client sarama.Client, topic string) map[int32]int64 {
	t.Helper()
	partitions, err := client.Partitions(topic)
	if err != nil {
		t.Fatal(err)
	}
	offsets := map[int32]int64{}
	for _, partition := range partitions {
		if offsets[partition], err = client.GetOffset(topic, partition, sarama.OffsetNewest); err != nil {
			t.Fatal(err)
		}
	}
	return offsets
}

func rabbitConn(t *testing.T, s *local.System) (*rabbit.Conn, *amqp.Session) {
	t.Helper()
	conn, err := rabbit.Dial(t.Context(), rabbit.Settings{
		Addr: s.Addr("rabbitmq"), Username: local.RabbitUser, Password: local.RabbitPassword,
	})
	if err != nil {
		t.Fatal(err)
	}
	session, err := conn.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	return conn, session
}

// queueSender sends to the queue message.
func queueSender(t *testing.T, s *local.System) *amqp.Sender {
	t.Helper()
	conn, session := rabbitConn(t, s)
	t.Cleanup(conn.Close)
	sender, err := session.NewSender(amqp.LinkTargetAddress(rabbit.Queue("message")))
	if err != nil {
		t.Fatal(err)
	}
	return sender
}

// take takes messages from a queue until none has come for a moment.
func take(t *testing.T, s *local.System, queue string, atLeast int) []*amqp.Message {
	t.Helper()
	conn, session := rabbitConn(t, s)
	defer conn.Close()
	receiver, err := session.NewReceiver(amqp.LinkSourceAddress(rabbit.Queue(queue)), amqp.LinkCredit(100))
	if err != nil {
		t.Fatal(err)
	}
	var all []*amqp.Message
	for {
		wait := 20 * time.Second
		if len(all) >= atLeast {
			wait = 500 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		m, err := receiver.Receive(ctx)
		cancel()
		if err != nil {
			return all
		}
		all = append(all, m)
	}
}
