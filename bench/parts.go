package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
)

const report = `{"description":"Test","country":"GT","weather":"Sunny"}`

// stores are clients of both stores.
type stores map[string]*redis.Client

func newStores(s *local.System) stores {
	all := stores{}
	for _, name := range []string{"redis", "valkey"} {
		all[name] = redis.NewClient(&redis.Options{Addr: s.Addr(name)})
	}
	return all
}

func (all stores) close() {
	for _, c := range all {
		c.Close()
	}
}

// totals are the reports counted so far.
func (all stores) total(ctx context.Context, name string) (int, error) {
	n, err := all[name].Get(ctx, "messages:total").Int()
	if errors.Is(err, redis.Nil) {
		return 0, nil
	}
	return n, err
}

// await returns when a store has counted that many.
func (all stores) await(ctx context.Context, name string, want int) error {
	for {
		n, err := all.total(ctx, name)
		switch {
		case err != nil:
			return err
		case n == want:
			return nil
		case n > want:
			return fmt.Errorf("%s has counted %d of %d: some twice", name, n, want)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// script is what wrk sends, and what it says at the end.
const script = `
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local one = '` + report + `'
local size = tonumber(os.getenv("BENCH_SIZE"))
if size == 1 then wrk.body = one else
  local all = {}
  for i = 1, size do all[i] = one end
  wrk.body = "[" .. table.concat(all, ",") .. "]"
end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d\n", summary.requests, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
end
`

var result = regexp.MustCompile(`RESULT (\d+) (\d+) (\d+) (\d+) (\d+)`)

// load posts for a while and waits until both stores have counted what was accepted.
func (b *bench) load(part string, clients, size int) error {
	before, err := b.stores.total(b.ctx, "redis")
	if err != nil {
		return err
	}
	path, err := os.CreateTemp("", "wrk-*.lua")
	if err != nil {
		return err
	}
	defer os.Remove(path.Name())
	if _, err := path.WriteString(script); err != nil {
		return err
	}
	path.Close()
	cpu := b.cpuTimes()
	start := time.Now()
	cmd := exec.CommandContext(b.ctx, "wrk", "-t1", "-c"+strconv.Itoa(clients), fmt.Sprintf("-d%ds", *seconds),
		"--timeout", "30s", "-s", path.Name(), b.system.URL()+"/reports")
	cmd.Env = append(os.Environ(), "BENCH_SIZE="+strconv.Itoa(size))
	said, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("wrk: %w\n%s", err, said)
	}
	took := time.Since(start).Seconds()
	found := result.FindStringSubmatch(string(said))
	if found == nil {
		return fmt.Errorf("wrk says %s", said)
	}
	var n [5]int
	for i := range n {
		n[i], _ = strconv.Atoi(found[i+1])
	}
	// wrk leaves the requests under way when it ends, which are accepted all the same: count what is there.
	if err := b.settle(before + (n[0]-n[1])*size); err != nil {
		return err
	}
	total, err := b.stores.total(b.ctx, "redis")
	if err != nil {
		return err
	}
	counted := time.Since(start).Seconds() - settling.Seconds()
	reports := float64(total - before)
	b.add(part, "accepted", float64((n[0]-n[1])*size)/took, "reports/s", "")
	b.add(part, "counted in both", reports/counted, "reports/s", "")
	b.add(part, "answered other than 202", float64(n[1]+n[2]), "requests", "")
	b.add(part, "latency p50", float64(n[3])/1000, "ms", "")
	b.add(part, "latency p99", float64(n[4])/1000, "ms", "")
	b.cpu(part, cpu, reports)
	return nil
}

// settling is how long both stores must agree and stand still to have counted everything.
const settling = 500 * time.Millisecond

// settle waits until both stores have counted at least that many, agree, and stand still.
func (b *bench) settle(atLeast int) error {
	deadline := time.Now().Add(2 * time.Minute)
	still, last := time.Now(), -1
	for time.Now().Before(deadline) {
		r, err := b.stores.total(b.ctx, "redis")
		if err != nil {
			return err
		}
		v, err := b.stores.total(b.ctx, "valkey")
		if err != nil {
			return err
		}
		if r != v || r < atLeast || r != last {
			still, last = time.Now(), r
		} else if time.Since(still) >= settling {
			return nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return fmt.Errorf("the stores have not counted %d and agreed within two minutes", atLeast)
}

// warm lets the Java machine compile what it runs: a Kafka that has just started costs eight times as much.
func (b *bench) warm() error {
	figures := b.figures
	defer func() { b.figures = figures }()
	if err := b.load("warming up, arrays", 16, 100); err != nil {
		return err
	}
	return b.load("warming up, singles", 50, 1)
}

func (b *bench) arrays() error { return b.load("arrays of 100", 16, 100) }

func (b *bench) singles() error {
	if err := b.load("singles, 50 clients", 50, 1); err != nil {
		return err
	}
	return b.load("singles, 200 clients", 200, 1)
}

func (b *bench) ungrouped() error {
	for _, clients := range []int{50, 200} {
		part := fmt.Sprintf("singles, %d clients", clients)
		if err := b.load("ungrouped "+part, clients, 1); err != nil {
			return err
		}
		b.add("group commit of one", part, b.value("ungrouped "+part, "counted in both"), "reports/s", "")
	}
	return nil
}

// probe posts one report of a country that nobody else reports, and returns how long after its acceptance each store
// has counted it.
func (b *bench) probe() (accepted time.Duration, counted map[string]time.Duration, err error) {
	const country = "AQ"
	before := map[string]int{}
	for name, c := range b.stores {
		n, err := c.HGet(b.ctx, "country:counts", country).Int()
		if err != nil && !errors.Is(err, redis.Nil) {
			return 0, nil, err
		}
		before[name] = n
	}
	start := time.Now()
	response, err := http.Post(b.system.URL()+"/reports", "application/json", strings.NewReader(`{"country":"`+country+`","weather":"Snow"}`))
	if err != nil {
		return 0, nil, err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusAccepted {
		return 0, nil, fmt.Errorf("a lone report is answered %s", response.Status)
	}
	acceptance := time.Now()
	counted = map[string]time.Duration{}
	var mu sync.Mutex
	var waiting sync.WaitGroup
	for name, c := range b.stores {
		waiting.Go(func() {
			for time.Since(acceptance) < 20*time.Second {
				n, _ := c.HGet(b.ctx, "country:counts", country).Int()
				if n > before[name] {
					mu.Lock()
					counted[name] = time.Since(acceptance)
					mu.Unlock()
					return
				}
				time.Sleep(200 * time.Microsecond)
			}
		})
	}
	waiting.Wait()
	if len(counted) < len(b.stores) {
		return 0, nil, fmt.Errorf("a lone report was accepted and counted only in %v", counted)
	}
	return acceptance.Sub(start), counted, nil
}

func (b *bench) probes(part string, n int, pause time.Duration, goal50, goal99 string) error {
	all := map[string][]time.Duration{}
	for range n {
		accepted, counted, err := b.probe()
		if err != nil {
			return err
		}
		all["answered"] = append(all["answered"], accepted)
		for name, d := range counted {
			all["accepted to counted in "+name] = append(all["accepted to counted in "+name], d)
		}
		all["accepted to counted in both"] = append(all["accepted to counted in both"], max(counted["redis"], counted["valkey"]))
		time.Sleep(pause)
	}
	for _, what := range []string{"answered", "accepted to counted in redis", "accepted to counted in valkey", "accepted to counted in both"} {
		ds := all[what]
		slices.Sort(ds)
		g50, g99 := "", ""
		if what == "accepted to counted in both" {
			g50, g99 = goal50, goal99
		}
		b.add(part, what+", p50", ds[len(ds)/2].Seconds()*1000, "ms", g50)
		b.add(part, what+", p99", ds[len(ds)*99/100].Seconds()*1000, "ms", g99)
	}
	return nil
}

func (b *bench) idle() error {
	return b.probes("idle", 200, 20*time.Millisecond, "≤ 10 ms", "")
}

// half posts arrays of ten at half of the rate that was measured, while lone reports are timed.
func (b *bench) half() error {
	rate := b.value("arrays of 100", "counted in both") / 2
	if rate == 0 {
		return fmt.Errorf("arrays must be measured first")
	}
	const size = 10
	body := []byte("[" + strings.Repeat(report+",", size-1) + report + "]")
	ctx, cancel := context.WithCancel(b.ctx)
	var posting sync.WaitGroup
	slots := make(chan struct{}, 256)
	posting.Go(func() {
		tick := time.NewTicker(time.Duration(float64(time.Second) * size / rate))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			select {
			case slots <- struct{}{}:
			default:
				continue // it cannot keep up; the figure says so
			}
			posting.Go(func() {
				defer func() { <-slots }()
				if response, err := client.Post(b.system.URL()+"/reports", "application/json", bytes.NewReader(body)); err == nil {
					response.Body.Close()
				}
			})
		}
	})
	start := time.Now()
	before, err := b.stores.total(b.ctx, "valkey")
	if err == nil {
		time.Sleep(time.Second)
		err = b.probes("half load", 300, 10*time.Millisecond, "", "≤ 100 ms")
	}
	after, _ := b.stores.total(b.ctx, "valkey")
	b.add("half load", "rate", float64(after-before)/time.Since(start).Seconds(), "reports/s", "")
	cancel()
	posting.Wait()
	return err
}

var client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 256}}

// startTimes is from exec to the first 200 of /readyz.
func (b *bench) startTimes() error {
	for _, name := range ours {
		var all []time.Duration
		p := b.system.Process(name)
		for range 7 {
			if err := p.Kill(); err != nil {
				return err
			}
			start := time.Now()
			if err := p.Start(b.ctx); err != nil {
				return err
			}
			all = append(all, time.Since(start))
		}
		slices.Sort(all)
		b.add("start to ready", name, all[len(all)/2].Seconds()*1000, "ms", "≤ 100 ms")
	}
	return nil
}

// post posts a body under a key once, and tells whether it was taken.
func (b *bench) post(body, key string) (bool, error) {
	request, err := http.NewRequestWithContext(b.ctx, http.MethodPost, b.system.URL()+"/reports", strings.NewReader(body))
	if err != nil {
		return false, err
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Idempotency-Key", key)
	response, err := client.Do(request)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusTooManyRequests || response.StatusCode == http.StatusServiceUnavailable {
		time.Sleep(10 * time.Millisecond)
		return false, nil
	}
	if response.StatusCode != http.StatusAccepted {
		return false, fmt.Errorf("answered %s", response.Status)
	}
	return true, nil
}
