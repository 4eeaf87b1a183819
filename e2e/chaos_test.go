package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const clients = 50

// TestChaos is the promise as a whole: while every program and every server is killed with SIGKILL and started again
// at least twice in turn, 50 clients send reports, and send them again under the same id until they are answered 202.
// CHAOS=long makes it 100,000 reports, SEED repeats a run.
func TestChaos(t *testing.T) {
	n := 10_000
	if os.Getenv("CHAOS") == "long" {
		n = 100_000
	}
	seed := uint64(time.Now().UnixNano())
	if given := os.Getenv("SEED"); given != "" {
		var err error
		if seed, err = strconv.ParseUint(given, 10, 64); err != nil {
			t.Fatalf("SEED: %v", err)
		}
	}
	t.Logf("%d reports; SEED=%d repeats this run", n, seed)
	s := running(t)
	random := rand.New(rand.NewPCG(seed, 0))

	victims := append(s.Processes(), s.Processes()...)
	random.Shuffle(len(victims), func(i, j int) { victims[i], victims[j] = victims[j], victims[i] })

	// The reports are set free share by share, one for each victim, so that each dies under load.
	var free, accepted atomic.Int64
	share := int64(n / len(victims))
	free.Store(share)
	want := counts{countries: map[string]int{}, weather: map[string]int{}}
	var mu sync.Mutex
	var sending sync.WaitGroup
	var next atomic.Int64
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n)*20*time.Millisecond+5*time.Minute)
	defer cancel()
	for i := range clients {
		random := rand.New(rand.NewPCG(seed, uint64(i)+1))
		sending.Go(func() {
			for ctx.Err() == nil {
				first := next.Load()
				size := int64(1)
				if random.IntN(5) == 0 {
					size = 1 + random.Int64N(100)
				}
				size = min(size, int64(n)-first)
				switch {
				case size <= 0:
					return
				case first+size > free.Load():
					time.Sleep(time.Millisecond)
					continue
				case !next.CompareAndSwap(first, first+size):
					continue
				}
				body, header, sent := request(random, seed, first, size)
				if err := insist(ctx, s.URL()+"/reports", body, header...); err != nil {
					t.Errorf("reports %d to %d: %v", first, first+size, err)
					return
				}
				accepted.Add(size)
				mu.Lock()
				want.total += sent.total
				for k, v := range sent.countries {
					want.countries[k] += v
				}
				for k, v := range sent.weather {
					want.weather[k] += v
				}
				mu.Unlock()
			}
		})
	}

	dead := take(t, s, "message.dead", 0)
	if len(dead) > 0 {
		t.Logf("%d dead letters of earlier tests", len(dead))
	}
	kafka := kafkaClient(t, s)
	before := ends(t, kafka, "message.dead")
	for i, p := range victims {
		for half := int64(i)*share + share/2; accepted.Load() < half; time.Sleep(time.Millisecond) {
			if ctx.Err() != nil {
				t.Fatalf("%d of %d were accepted when the time was over", accepted.Load(), n)
			}
		}
		kill(t, p)
		time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
		start(t, p)
		t.Logf("%2d of %d: killed %-15s at %d accepted, back at %d", i+1, len(victims), p.Name(), int64(i)*share+share/2, accepted.Load())
		free.Add(share)
	}
	free.Store(int64(n))
	sending.Wait()
	if t.Failed() {
		return
	}
	if want.total != n {
		t.Fatalf("%d were sent, not %d", want.total, n)
	}
	counted(t, s, want)
	if letters := records(t, kafkaClient(t, s), "message.dead", before); len(letters) > 0 {
		t.Errorf("%d dead letters on Kafka, the first: %s", len(letters), letters[0].Value)
	}
	if letters := take(t, s, "message.dead", 0); len(letters) > 0 {
		t.Errorf("%d dead letters on RabbitMQ, the first: %s", len(letters), letters[0].GetData())
	}
}

// request is one request in one of the modes, with what it should add to the counts.
func request(random *rand.Rand, seed uint64, first, size int64) (body string, header []string, sent counts) {
	sent = counts{int(size), map[string]int{}, map[string]int{}}
	countries := []string{"GT", "ESP", "ES", "de", "FRA", "jp", "US", "BRA"}
	weather := []string{"Sunny", "Rain", "Snow", "Fog", "☀️"}
	report := func() string {
		country, w := countries[random.IntN(len(countries))], weather[random.IntN(len(weather))]
		sent.countries[map[string]string{"de": "DE", "jp": "JP"}[country]+map[bool]string{true: country}[country != "de" && country != "jp"]]++
		sent.weather[w]++
		b, _ := json.Marshal(map[string]string{"country": country, "weather": w, "description": "Test"})
		return string(b)
	}
	event := func(i int64) string {
		return fmt.Sprintf(`{"specversion":"1.0","type":"dev.isobar.weather.report.v1","source":"/chaos/%d","id":"%d","data":%s}`, seed, i, report())
	}
	join := func(one func(int64) string) string {
		all := "["
		for i := range size {
			if i > 0 {
				all += ","
			}
			all += one(first + i)
		}
		return all + "]"
	}
	key := []string{"Idempotency-Key", fmt.Sprintf(`"%d-%d"`, seed, first)}
	switch random.IntN(4) {
	case 0:
		return join(event), []string{"Content-Type", "application/cloudevents-batch+json"}, sent
	case 1:
		if size == 1 {
			return event(first), []string{"Content-Type", "application/cloudevents+json"}, sent
		}
	case 2:
		if size == 1 {
			return report(), []string{
				"Ce-Specversion", "1.0", "Ce-Type", "dev.isobar.weather.report.v1",
				"Ce-Source", fmt.Sprintf("/chaos/%d", seed), "Ce-Id", fmt.Sprint(first),
			}, sent
		}
	case 3:
		if size == 1 {
			return report(), key, sent
		}
	}
	return join(func(int64) string { return report() }), key, sent
}
