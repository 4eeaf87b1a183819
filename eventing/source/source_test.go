package source

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/config/local"
)

func TestSources(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(testing.TB) *world{"Kafka": startKafka, "RabbitMQ": func(t testing.TB) *world { return startRabbitMQ(t) }} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			for name, test := range map[string]func(*testing.T, *world, string){
				"events arrive as they were, many together":                  testDelivered,
				"a lone event does not wait for others":                      testLone,
				"a sink that is away is tried until it is back":              testUnavailable,
				"a sink that refuses connections is tried until it is up":    testRefused,
				"while the sink is slow, what arrives makes the next batch":  testSlow,
				"a poison event that the sink names is dead-lettered alone":  testPoisonNamed,
				"a poison event that the sink does not name is found":        testPoisonSought,
				"a sink that knows no batches gets single events":            testNoBatches,
				"the largest event that is refused is dead-lettered":         testPoisonLarge,
				"while there is no place for dead letters the others go on":  testNoDeadLetters,
				"killed broker: each of 10,000 is delivered":                 testBrokerKilled,
				"connections cut in mid-flight: each of 10,000 is delivered": testCut,
				"a killed source's successor gets what was in flight":        testSourceKilled,
				"a stopped source settles what is under way and no more":     testDrained,
				"a topic or queue that is not there is waited for":           testMissing,
				"a topic or queue that is deleted and made again is another": testRecreated,
				"plain messages of others are wrapped under a lasting id":    testForeign,
				"K_CE_OVERRIDES adds extensions":                             testOverrides,
			} {
				t.Run(name, func(t *testing.T) {
					topic := fmt.Sprintf("%.8s-%x", strings.ReplaceAll(name, " ", "-"), time.Now().UnixNano())
					w.create(t, topic)
					w.create(t, topic+".dead")
					test(t, w, topic)
				})
			}
		})
	}
}

func testDelivered(t *testing.T, w *world, name string) {
	sink := record(t)
	all := reports("a", 3000)
	w.publish(t, name, all)
	deliver(t, w.open(name), sink.settings())
	sink.awaitAll(t, all)
	for _, e := range all {
		got := sink.last[e.ID()]
		if got.Source() != e.Source() || string(got.Data()) != string(e.Data()) || got.Subject() != e.Subject() ||
			got.Type() != e.Type() || !got.Time().Equal(e.Time()) || got.DataContentType() != e.DataContentType() {
			t.Fatalf("published\n%s\nand got\n%s", e, got)
		}
	}
	if sink.posts > len(all)/20 {
		t.Errorf("%d POSTs for %d events", sink.posts, len(all))
	}
}

func testLone(t *testing.T, w *world, name string) {
	sink := record(t)
	deliver(t, w.open(name), sink.settings())
	w.publish(t, name, reports("first", 1))
	sink.awaitAll(t, reports("first", 1)) // it is connected now
	var slowest time.Duration
	for i := range 5 {
		one := reports(fmt.Sprint("lone-", i), 1)
		w.publish(t, name, one)
		published := time.Now()
		sink.awaitAll(t, one)
		slowest = max(slowest, time.Since(published))
	}
	if slowest > time.Second {
		t.Errorf("it took %v", slowest)
	}
}

func testUnavailable(t *testing.T, w *world, name string) {
	sink := record(t)
	statuses := []int{503, 429, 502, 504, 500, 408, 404, 301}
	var n atomic.Int64
	sink.answer(func([]event.Event) (int, map[string]any) {
		if i := int(n.Add(1)) - 1; i < len(statuses) {
			return statuses[i], map[string]any{"detail": "not now", "index": 0}
		}
		return http.StatusNoContent, nil
	})
	all := reports("a", 100)
	w.publish(t, name, all)
	deliver(t, w.open(name), sink.settings())
	sink.awaitAll(t, all)
	for id, times := range sink.taken {
		if times != 1 {
			t.Errorf("%s was taken %d times", id, times)
		}
	}
	if sink.tries <= len(statuses) {
		t.Errorf("it was tried %d times", sink.tries)
	}
}

func testRefused(t *testing.T, w *world, name string) {
	addr := freeAddr(t)
	all := reports("a", 100)
	w.publish(t, name, all)
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	deliver(t, w.open(name), SinkSettings{Sink: "http://" + addr})
	conn, err := listener.Accept()
	listener.Close() // from here on connections are refused
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()

	sink := recordAt(t, addr)
	sink.awaitAll(t, all)
}

func testSlow(t *testing.T, w *world, name string) {
	sink := record(t)
	open := make(chan struct{})
	var first atomic.Int64
	sink.answer(func([]event.Event) (int, map[string]any) {
		if first.Add(1) <= posts {
			<-open
		}
		return http.StatusNoContent, nil
	})
	defer func() {
		select {
		case <-open:
		default:
			close(open)
		}
	}()
	src := w.open(name)
	deliver(t, src, sink.settings())
	// One event each takes all that may be under way.
	for i := range posts {
		w.publish(t, name, reports(fmt.Sprint("slow-", i), 1))
		sink.await(t, "the next POST is under way", func() bool { return sink.tries > i })
	}
	all := reports("a", 900)
	w.publish(t, name, all)
	if first.Load() != posts {
		t.Fatalf("%d POSTs under way", first.Load())
	}
	for deadline := time.Now().Add(time.Minute); waiting(src) < len(all); {
		if time.Now().After(deadline) {
			t.Fatalf("%d events have arrived", waiting(src))
		}
		time.Sleep(5 * time.Millisecond)
	}
	close(open)
	sink.awaitAll(t, all)
	if sink.posts != posts+1 {
		t.Errorf("%d POSTs", sink.posts)
	}
}

// waiting is how many events have arrived and were not taken.
func waiting(src Source) int {
	var b *inbox
	switch src := src.(type) {
	case *Kafka:
		b = src.inbox
	case *Rabbit:
		b = src.inbox
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.waiting)
}

func poisoned(t *testing.T, w *world, name string, status int, named bool) {
	sink := record(t)
	sink.answer(func(batch []event.Event) (int, map[string]any) {
		i := slices.IndexFunc(batch, func(e event.Event) bool { return strings.HasPrefix(e.ID(), "poison") })
		switch {
		case i < 0:
			return http.StatusAccepted, nil
		case named:
			return status, map[string]any{"title": "no", "detail": "country must be a code", "index": i}
		}
		return status, map[string]any{"title": "no", "detail": "country must be a code"}
	})
	all := reports("a", 1000)
	bad := reports("poison", 2)
	w.publish(t, name, slices.Concat(all[:300], bad[:1], all[300:600], bad[1:], all[600:]))
	deliver(t, w.open(name), sink.settings())
	sink.awaitAll(t, all)
	letters := w.deadLetters(t, name, 2)
	for _, e := range bad {
		letter, ok := letters[e.ID()]
		if !ok {
			t.Fatalf("%s is not in the dead letters", e.ID())
		}
		if letter.Source() != e.Source() || string(letter.Data()) != string(e.Data()) || letter.Type() != e.Type() {
			t.Errorf("the dead letter is not the event: %s", letter)
		}
		extensions := letter.Extensions()
		if extensions[errorDest] != sink.URL || extensions[errorCode] != fmt.Sprint(status) ||
			extensions[errorData] != "country must be a code" {
			t.Errorf("the reason is %v", extensions)
		}
		if sink.taken[e.ID()] != 0 {
			t.Errorf("%s was taken", e.ID())
		}
	}
}

func testPoisonNamed(t *testing.T, w *world, name string)  { poisoned(t, w, name, 422, true) }
func testPoisonSought(t *testing.T, w *world, name string) { poisoned(t, w, name, 400, false) }

// testPoisonLarge: its dead letter is larger by the reason, and can't be compressed.
func testPoisonLarge(t *testing.T, w *world, name string) {
	random := rand.NewChaCha8([32]byte{})
	reason := make([]byte, maxReason/2)
	_, _ = random.Read(reason)
	sink := record(t)
	sink.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.WriteHeader(http.StatusRequestEntityTooLarge)
		fmt.Fprintf(rw, "%x", reason)
	})
	large := reports("large", 1)
	large[0].DataEncoded = make([]byte, 1<<20-1000)
	_, _ = random.Read(large[0].DataEncoded)
	large[0].SetDataContentType("application/octet-stream")
	w.publish(t, name, large)
	deliver(t, w.open(name), sink.settings())
	letter := w.deadLetters(t, name, 1)[large[0].ID()]
	if !bytes.Equal(letter.Data(), large[0].Data()) || letter.Extensions()[errorData] != fmt.Sprintf("%x", reason) {
		t.Errorf("the dead letter has %d bytes, of %d, and the extensions %v", len(letter.Data()), len(large[0].Data()), letter.Extensions())
	}
}

func testNoBatches(t *testing.T, w *world, name string) {
	sink := record(t)
	sink.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Content-Type") != eventMediaType {
			rw.WriteHeader(http.StatusUnsupportedMediaType)
			return
		}
		sink.serve(rw, r)
	})
	all := reports("a", 20)
	w.publish(t, name, all)
	deliver(t, w.open(name), sink.settings())
	sink.awaitAll(t, all)
}

func testNoDeadLetters(t *testing.T, w *world, name string) {
	w.remove(t, name+".dead")
	sink := record(t)
	sink.answer(func(batch []event.Event) (int, map[string]any) {
		if i := slices.IndexFunc(batch, func(e event.Event) bool { return e.ID() == "poison-0" }); i >= 0 {
			return 422, map[string]any{"index": i}
		}
		return http.StatusNoContent, nil
	})
	deliver(t, w.open(name), sink.settings())
	w.publish(t, name, reports("poison", 1))
	sink.await(t, "the poison is refused", func() bool { return sink.tries > 0 })
	all := reports("a", 100)
	w.publish(t, name, all)
	sink.awaitAll(t, all)
	w.create(t, name+".dead")
	w.deadLetters(t, name, 1)
}

// testBrokerKilled publishes 10,000 events, kills the broker while they are being delivered and starts it again.
func testBrokerKilled(t *testing.T, w *world, name string) {
	disturbed(t, w, name, func(t *testing.T) {
		if err := w.server.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func testCut(t *testing.T, w *world, name string) {
	disturbed(t, w, name, func(*testing.T) { w.proxy.Cut() })
}

func disturbed(t *testing.T, w *world, name string, disturb func(*testing.T)) {
	sink := record(t)
	sink.answer(func(batch []event.Event) (int, map[string]any) {
		time.Sleep(time.Duration(len(batch)) * 50 * time.Microsecond) // so that it takes a while
		return http.StatusNoContent, nil
	})
	all := reports("a", 10_000)
	w.publish(t, name, all)
	deliver(t, w.open(name), sink.settings())
	for _, part := range []int{1000, 5000} {
		sink.await(t, fmt.Sprint(part, " are taken"), func() bool { return len(sink.taken) >= part })
		disturb(t)
	}
	sink.awaitAll(t, all)
}

func testSourceKilled(t *testing.T, w *world, name string) {
	binary := filepath.Join(t.TempDir(), w.program)
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "isobar.dev/eventing/"+w.program).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// The first sink never answers, so nothing may be settled.
	silent := record(t)
	leave := make(chan struct{})
	t.Cleanup(func() { close(leave) })
	silent.answer(func([]event.Event) (int, map[string]any) {
		<-leave
		return http.StatusServiceUnavailable, nil
	})
	all := reports("a", 1500)
	w.publish(t, name, all)
	killed := local.NewProcess(local.Spec{
		Name: w.program, Path: binary, Log: filepath.Join(t.TempDir(), "log"), Env: append(w.env(name), "K_SINK="+silent.URL),
	})
	if err := killed.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = killed.Kill() })
	silent.await(t, "a POST is under way", func() bool { return silent.tries > 0 })
	if err := killed.Kill(); err != nil {
		t.Fatal(err)
	}
	sink := record(t)
	deliver(t, w.open(name), sink.settings())
	sink.awaitAll(t, all)
}

func testDrained(t *testing.T, w *world, name string) {
	sink := record(t)
	answer := make(chan struct{})
	sink.answer(func([]event.Event) (int, map[string]any) {
		<-answer
		return http.StatusNoContent, nil
	})
	r := deliver(t, w.open(name), sink.settings())
	first := reports("first", 1)
	w.publish(t, name, first)
	sink.await(t, "a POST is under way", func() bool { return sink.tries > 0 })
	r.stop()
	after := reports("after", 10)
	w.publish(t, name, after)
	close(answer)
	<-r.stopped
	if sink.taken["first-0"] != 1 || len(sink.taken) != 1 {
		t.Fatalf("the stopped source delivered %v", sink.taken)
	}
	next := record(t)
	deliver(t, w.open(name), next.settings())
	next.awaitAll(t, after)
	if next.taken["first-0"] != 0 {
		t.Error("what was settled was delivered again")
	}
}

func testMissing(t *testing.T, w *world, name string) {
	w.remove(t, name)
	sink := record(t)
	src := w.open(name)
	deliver(t, src, sink.settings())
	for deadline := time.Now().Add(30 * time.Second); src.State() == "not connected yet"; {
		if time.Now().After(deadline) {
			t.Fatal("the source has not tried")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if strings.HasPrefix(src.State(), "connected") {
		t.Fatal("connected to what is not there")
	}
	w.create(t, name)
	all := reports("a", 10)
	w.publish(t, name, all)
	sink.awaitAll(t, all)
}

func testRecreated(t *testing.T, w *world, name string) {
	sink := record(t)
	deliver(t, w.open(name), sink.settings())
	before := w.foreign(t, name, `{"n":1}`)
	sink.await(t, "the first is taken", func() bool { return sink.taken[before] > 0 })
	first := sink.last[before]
	w.publish(t, name, reports("before", 50))
	sink.awaitAll(t, reports("before", 50))

	w.remove(t, name)
	w.create(t, name)
	// More than before: offsets of the first topic would skip the second one's beginning.
	all := reports("after", 200)
	w.publish(t, name, all)
	sink.awaitAll(t, all)
	for range 40 { // until the partition of the first one has its turn at offset 0..n
		id := w.foreign(t, name, `{"n":2}`)
		sink.await(t, "the second is taken", func() bool { return string(sink.last[id].Data()) == `{"n":2}` })
		if id == before && sink.last[id].Source() == first.Source() {
			t.Fatalf("two messages of two topics are both %s of %s", id, first.Source())
		}
	}
}

func testForeign(t *testing.T, w *world, name string) {
	sink := record(t)
	bodies := map[string]string{}
	for _, body := range []string{`{"description":"Test","country":"GT","weather":"Sunny"}`, `{"country":`, "text", `"`} {
		bodies[w.foreign(t, name, body)] = body
	}
	src := w.open(name)
	first := deliver(t, src, sink.settings())
	for id, body := range bodies {
		sink.await(t, id+" is taken", func() bool { return sink.taken[id] > 0 })
		e := sink.last[id]
		if string(e.Data()) != body || e.Type() != "dev.isobar.weather.report.v1" || !strings.Contains(e.Source(), name) {
			t.Errorf("%q arrived as %s", body, e)
		}
	}
	first.end()
}

func testOverrides(t *testing.T, w *world, name string) {
	sink := record(t)
	settings := sink.settings()
	settings.Overrides = `{"extensions":{"cluster":"a","region":"b"}}`
	all := reports("a", 10)
	all[3].SetExtension("region", "own")
	w.publish(t, name, all)
	deliver(t, w.open(name), settings)
	sink.awaitAll(t, all)
	for id, e := range sink.last {
		if x := e.Extensions(); x["cluster"] != "a" || x["region"] != "b" {
			t.Errorf("%s has %v", id, x)
		}
	}
}
