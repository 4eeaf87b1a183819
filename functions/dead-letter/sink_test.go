package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/config/local"
	"isobar.dev/events"
)

// world is the program and a Kafka that are both real.
type world struct {
	kafka   *local.Process
	program *local.Process
}

func start(t *testing.T) *world {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "dead-letter")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "isobar.dev/functions/dead-letter").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	port, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{kafka: local.StartKafka(t)}
	w.program = local.NewProcess(local.Spec{
		Name: "dead-letter", Path: binary, Log: filepath.Join(t.TempDir(), "log"), Addr: fmt.Sprint("127.0.0.1:", port),
		Env: []string{"HOST=127.0.0.1", fmt.Sprint("PORT=", port), "KAFKA_BOOTSTRAP_SERVERS=" + w.kafka.Addr()},
	})
	t.Cleanup(func() {
		if err := w.program.Kill(); err != nil {
			t.Error(err)
		}
	})
	if err := w.program.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// answer is what the program says.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) String() string { return fmt.Sprintf("%d: %s", a.status, a.body) }

// post posts a body with headers, names and values in turn.
func (w *world) post(t *testing.T, body io.Reader, headers ...string) answer {
	return w.request(t, http.MethodPost, "/", body, headers...)
}

func (w *world) request(t *testing.T, method, path string, body io.Reader, headers ...string) answer {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+w.program.Addr()+path, body)
	if err != nil {
		t.Error(err)
		return answer{}
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Error(err)
		return answer{}
	}
	defer response.Body.Close()
	a := answer{status: response.StatusCode, header: response.Header}
	if a.body, err = io.ReadAll(response.Body); err != nil {
		t.Error(err)
	}
	return a
}

// letters sends what is in the topic, from its beginning, until ctx ends.
func (w *world) letters(ctx context.Context, t *testing.T) <-chan event.Event {
	t.Helper()
	consumer, err := sarama.NewConsumer([]string{w.kafka.Addr()}, nil)
	if err != nil {
		t.Fatal(err)
	}
	partition, err := consumer.ConsumePartition("message.dead", 0, sarama.OffsetOldest)
	if err != nil {
		t.Fatal(err)
	}
	letters := make(chan event.Event)
	go func() {
		defer consumer.Close()
		defer partition.Close()
		for {
			select {
			case record := <-partition.Messages():
				select {
				case letters <- events.ReadRecord(record, "/dead"):
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return letters
}

// expect waits until the events of these ids are in the topic, and returns them.
func (w *world) expect(t *testing.T, ids ...string) map[string]event.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	missing, found := map[string]bool{}, map[string]event.Event{}
	for _, id := range ids {
		missing[id] = true
	}
	letters := w.letters(ctx, t)
	for len(missing) > 0 {
		select {
		case e := <-letters:
			if missing[e.ID()] {
				found[e.ID()] = e
				delete(missing, e.ID())
			}
		case <-ctx.Done():
			t.Fatalf("%d of %d letters are not stored", len(missing), len(ids))
		}
	}
	return found
}

func TestDeadLetters(t *testing.T) {
	w := start(t)
	for name, test := range map[string]func(*testing.T, *world){
		"what is posted is stored":                                  testStored,
		"what is no CloudEvent is refused":                          testRefused,
		"many large ones at once, more than Kafka takes as a batch": testTogether,
		"one that is too large for the topic is not taken for sent": testTooLarge,
		"while Kafka is silent, all are told so at the same time":   testSilent,
		"killed while 2,000 are posted: what was answered is in":    testKilled,
	} {
		t.Run(name, func(t *testing.T) { test(t, w) })
	}
}

// dead are the headers of a dead letter, as KafkaSource writes them, and more.
func dead(id string, more ...string) []string {
	return append([]string{
		"Ce-Specversion", "1.0", "Ce-Id", id, "Ce-Source", "/app", "Ce-Type", events.Type, "Content-Type", "application/json",
		"Ce-Knativekafkapartition", "3", "Ce-Knativekafkaoffset", "7", "Ce-Knativeerrordest", "http://redis-writer.isobar.svc.cluster.local",
		"Ce-Knativeerrorcode", "422", "Ce-Knativeerrordata", "eyJzdGF0dXMiOjQyMn0=", "Prefer", "reply", "Kn-Namespace", "isobar",
	}, more...)
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

func testStored(t *testing.T, w *world) {
	const report = `{"country":"XX","weather":"Sunny"}`
	foreign := []string{
		"Ce-Specversion", "1.0", "Ce-Id", "partition:3/offset:7", "Ce-Source", "/apis/v1/namespaces/isobar/kafkasources/reports#message",
		"Ce-Type", "dev.knative.kafka.event", "Ce-Subject", "partition:3#7", "Ce-Time", "2026-08-01T10:00:00.5Z",
	}
	long := strings.Repeat("i", 10_000)
	for _, c := range []struct {
		name    string
		headers []string
		body    []byte
		id      string
		is      func(e event.Event) bool // besides the data, which must be the body
	}{
		{"a report, with its reason", dead("report"), []byte(report), "report", func(e event.Event) bool {
			x := e.Extensions()
			return e.Source() == "/app" && e.Type() == events.Type && e.DataContentType() == "application/json" &&
				x["knativekafkapartition"] == "3" && x["knativekafkaoffset"] == "7" && x["knativeerrorcode"] == "422" &&
				x["knativeerrordest"] == "http://redis-writer.isobar.svc.cluster.local" && x["knativeerrordata"] == "eyJzdGF0dXMiOjQyMn0="
		}},
		{"a record that was no CloudEvent", foreign, []byte("\x00 no JSON \xff"), "partition:3/offset:7", func(e event.Event) bool {
			return e.Type() == "dev.knative.kafka.event" && e.Subject() == "partition:3#7" && e.DataContentType() == "" && e.Time().Nanosecond() == 5e8
		}},
		{"no data", dead("empty"), nil, "empty", nil},
		{"an id beyond our limits", dead(long), []byte(report), long, nil},
		{"headers of 1.5 MiB", dead("headers", "Ce-Kafkaheadera", strings.Repeat("a", 1<<20), "Ce-Kafkaheaderb", strings.Repeat("b", 1<<19)), []byte(report), "headers", func(e event.Event) bool {
			return e.Extensions()["kafkaheadera"] == strings.Repeat("a", 1<<20) && e.Extensions()["kafkaheaderb"] == strings.Repeat("b", 1<<19)
		}},
		{"almost 2 MiB that can't be compressed", dead("noise"), noise(2<<20 - 2000), "noise", nil},
		{"8 MiB that can", dead("spaces"), bytes.Repeat([]byte(" "), maxLetter), "spaces", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if a := w.post(t, bytes.NewReader(c.body), c.headers...); a.status != 204 {
				t.Fatalf("answered %s", a)
			}
			e := w.expect(t, c.id)[c.id]
			if !bytes.Equal(e.Data(), c.body) {
				t.Errorf("the data is %d bytes, not the %d that were posted", len(e.Data()), len(c.body))
			}
			if c.is != nil && !c.is(e) {
				t.Errorf("stored is %.2000s", e)
			}
		})
	}
	const event = `{"specversion":"1.0","id":%q,"source":"/app","type":"com.example","knativeerrorcode":422,"data":{"a":1}}`
	for name, c := range map[string]struct {
		contentType, body string
		ids               []string
	}{
		"structured": {"application/cloudevents+json; charset=utf-8", fmt.Sprintf(event, "s-1"), []string{"s-1"}},
		"a batch":    {"application/cloudevents-batch+json", fmt.Sprintf("["+event+","+event+"]", "b-1", "b-2"), []string{"b-1", "b-2"}},
	} {
		t.Run(name, func(t *testing.T) {
			body := io.MultiReader(strings.NewReader(c.body)) // of a length that is not known
			if a := w.post(t, body, "Content-Type", c.contentType); a.status != 204 {
				t.Fatalf("answered %s", a)
			}
			for id, e := range w.expect(t, c.ids...) {
				if e.Type() != "com.example" || e.Extensions()["knativeerrorcode"] != "422" || string(e.Data()) != `{"a":1}` {
					t.Errorf("%s is stored as %s", id, e)
				}
			}
		})
	}
}

func testRefused(t *testing.T, w *world) {
	const structured = "application/cloudevents+json"
	for _, c := range []struct {
		name    string
		headers []string
		body    string
		status  int
		says    string
	}{
		{"nothing", nil, "", 415, "content type"},
		{"plain JSON", []string{"Content-Type", "application/json"}, `{"country":"GT"}`, 415, "without a ce-specversion"},
		{"an id alone", []string{"Ce-Id", "a"}, "", 400, "ce-specversion"},
		{"no id", []string{"Ce-Specversion", "1.0", "Ce-Source", "/", "Ce-Type", "t"}, "", 400, "ce-id"},
		{"structured: broken JSON", []string{"Content-Type", structured}, "{", 400, "ends too early"},
		{"structured: a string", []string{"Content-Type", structured}, `"x"`, 422, "JSON object"},
		{"structured: data_base64 that is a number", []string{"Content-Type", structured}, `{"specversion":"1.0","id":"a","source":"/","type":"t","data_base64":1}`, 422, "base64"},
		{"structured: zipped", []string{"Content-Type", structured, "Content-Encoding", "gzip"}, "\x1f\x8b", 415, "gzip"},
		{"more than 8 MiB", dead("large", "Expect", "100-continue"), strings.Repeat(" ", maxLetter+1), 413, "8388608 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := w.post(t, strings.NewReader(c.body), c.headers...)
			if a.status != c.status || !strings.Contains(string(a.body), c.says) || a.header.Get("Retry-After") != "" ||
				a.header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("answered %s", a)
			}
		})
	}
	if a := w.request(t, http.MethodPut, "/", nil, dead("put")...); a.status != 405 {
		t.Errorf("PUT: answered %s", a)
	}
	if a := w.request(t, http.MethodPost, "/reports", nil, dead("elsewhere")...); a.status != 404 {
		t.Errorf("elsewhere: answered %s", a)
	}
}

// testTogether: each partition of a topic may have its dead letter at the same time.
func testTogether(t *testing.T, w *world) {
	var ids []string
	var posting sync.WaitGroup
	for i := range 16 {
		id := fmt.Sprint("together-", i)
		ids = append(ids, id)
		posting.Go(func() {
			if a := w.post(t, bytes.NewReader(noise(1<<20-1000)), dead(id)...); a.status != 204 {
				t.Errorf("answered %s", a)
			}
		})
	}
	posting.Wait()
	w.expect(t, ids...)
}

func testTooLarge(t *testing.T, w *world) {
	a := w.post(t, bytes.NewReader(noise(3<<20)), dead("too-large")...)
	if a.status != 503 || a.header.Get("Retry-After") == "" || !strings.Contains(string(a.body), "max.message.bytes") {
		t.Errorf("answered %s", a)
	}
	if a := w.post(t, strings.NewReader("{}"), dead("after")...); a.status != 204 {
		t.Errorf("the next one is answered %s", a)
	}
}

// testSilent: all of them are on their way to Kafka at once, or some would be told that others are.
func testSilent(t *testing.T, w *world) {
	if err := w.kafka.Pause(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var posting sync.WaitGroup
	for i := range 50 {
		posting.Go(func() {
			a := w.post(t, strings.NewReader("{}"), dead(fmt.Sprint("silent-", i))...)
			if a.status != 503 || a.header.Get("Retry-After") == "" || !strings.Contains(string(a.body), "message.dead") {
				t.Errorf("answered %s", a)
			}
		})
	}
	posting.Wait()
	if took := time.Since(began); took > 2*patience {
		t.Errorf("it took %v", took)
	}
	if err := w.kafka.Resume(); err != nil {
		t.Fatal(err)
	}
	w.insist(t, "after-silence")
}

// testKilled posts from eight clients, each of which insists, and kills Kafka after a third.
func testKilled(t *testing.T, w *world) {
	const all, clients = 2000, 8
	ids := make(chan string, all)
	for i := range all {
		ids <- fmt.Sprint("killed-", i)
	}
	close(ids)
	var mu sync.Mutex
	var stored []string
	third := make(chan struct{})
	var posting sync.WaitGroup
	for range clients {
		posting.Go(func() {
			for id := range ids {
				if !w.insist(t, id) {
					return
				}
				mu.Lock()
				if stored = append(stored, id); len(stored) == all/3 {
					close(third)
				}
				mu.Unlock()
			}
		})
	}
	<-third
	if err := w.kafka.Kill(); err != nil {
		t.Fatal(err)
	}
	w.awaitReadyz(t, `"kafka":"away`)
	if err := w.kafka.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	posting.Wait()
	w.awaitReadyz(t, `"kafka":"connected"`)
	if len(stored) != all {
		t.Errorf("%d of %d are answered", len(stored), all)
	}
	w.expect(t, stored...)
}

// insist posts a letter until it is taken, as a source does.
func (w *world) insist(t *testing.T, id string) bool {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		a := w.post(t, strings.NewReader("{}"), dead(id)...)
		if a.status == 204 {
			return true
		}
		if a.status != 503 || a.header.Get("Retry-After") == "" || time.Now().After(deadline) {
			t.Errorf("answered %s", a)
			return false
		}
	}
}

func (w *world) awaitReadyz(t *testing.T, says string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		a := w.request(t, http.MethodGet, "/readyz", nil)
		if a.status == 200 && strings.Contains(string(a.body), says) {
			return
		}
		if a.status != 200 || time.Now().After(deadline) {
			t.Fatalf("/readyz: answered %s", a)
		}
	}
}
