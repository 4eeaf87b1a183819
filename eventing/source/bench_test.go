package source

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/redis/go-redis/v9"

	"isobar.dev/config/local"
	"isobar.dev/internal/rabbit"
)

// BenchmarkBacklog drains a backlog through each source into its writer and store, all of them real programs, and lets
// a bare go-amqp client accept another one for comparison. One run of each is enough: -benchtime 1x.
func BenchmarkBacklog(b *testing.B) {
	const backlog = 300_000
	for name, start := range map[string]func(testing.TB) *world{"Kafka": startKafka, "RabbitMQ": func(t testing.TB) *world { return startRabbitMQ(t) }} {
		b.Run(name, func(b *testing.B) {
			w := start(b)
			fill := func(name string) {
				w.create(b, name)
				w.create(b, name+".dead")
				for i := range backlog / 10_000 {
					w.publish(b, name, reports(strconv.Itoa(i), 10_000))
				}
			}
			for b.Loop() {
				var bare float64
				if w.program == "rabbitmq-source" {
					fill("bare")
					began := time.Now()
					acceptBare(b, w.server.Addr(), "bare", backlog)
					bare = backlog / time.Since(began).Seconds()
					b.ReportMetric(bare, "bare/s")
				}
				fill("backlog")
				rate := drain(b, w, backlog)
				if bare > 0 {
					b.ReportMetric(rate/bare, "of-bare")
				}
			}
		})
	}
}

func drain(b *testing.B, w *world, backlog int) float64 {
	store, writer, env := local.StartRedis(b), "redis-writer", "REDIS_ADDR="
	if w.program == "rabbitmq-source" {
		store, writer, env = local.StartValkey(b), "valkey-writer", "VALKEY_ADDR="
	}
	dir := b.TempDir()
	for program, of := range map[string]string{writer: "functions", w.program: "eventing"} {
		if out, err := exec.CommandContext(b.Context(), "go", "build", "-o", dir, "isobar.dev/"+of+"/"+program).CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
	run := func(program, addr string, env ...string) *local.Process {
		p := local.NewProcess(local.Spec{Name: program, Path: filepath.Join(dir, program), Log: filepath.Join(dir, program+".log"), Env: env, Addr: addr})
		if err := p.Start(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = p.Kill() })
		return p
	}
	addr := freeAddr(b)
	_, port, _ := strings.Cut(addr, ":")
	writing := run(writer, addr, "HOST=127.0.0.1", "PORT="+port, env+store.Addr())
	client := redis.NewClient(&redis.Options{Addr: store.Addr()})
	defer client.Close()
	began := time.Now()
	source := run(w.program, "", append(w.env("backlog"), "K_SINK=http://"+addr+"/")...)
	var first time.Duration
	for {
		total, _ := client.Get(b.Context(), "messages:total").Int()
		if total > 0 && first == 0 {
			first = time.Since(began)
			b.ReportMetric(first.Seconds(), "s-to-first")
		}
		if total == backlog {
			break
		}
		if time.Since(began) > 5*time.Minute {
			b.Fatalf("%d of %d counted", total, backlog)
		}
		time.Sleep(20 * time.Millisecond)
	}
	rate := float64(backlog) / time.Since(began).Seconds()
	b.ReportMetric(rate, "events/s")
	for _, p := range []struct {
		name string
		*local.Process
	}{{"source", source}, {"writer", writing}, {"store", store}, {"broker", w.server}} {
		cpu, peak := usage(b, p.Pid())
		if p.name != "broker" { // the broker's is that of filling it too
			b.ReportMetric(float64(cpu.Microseconds())/float64(backlog), p.name+"-cpu-us")
		}
		b.ReportMetric(peak, p.name+"-peak-MiB")
	}
	return rate
}

// usage is a process's CPU time and peak memory.
func usage(b *testing.B, pid int) (cpu time.Duration, peakMiB float64) {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	const tick = 10 * time.Millisecond
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	kib, _ := strconv.Atoi(strings.Fields(after)[0])
	return time.Duration(user+system) * tick, float64(kib) / 1024
}

// acceptBare accepts messages with go-amqp over several links, as fast as it can.
func acceptBare(b *testing.B, addr, queue string, n int) {
	b.Helper()
	conn, err := rabbit.Dial(b.Context(), rabbit.Settings{Addr: addr, Username: local.RabbitUser, Password: local.RabbitPassword})
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	accepted := make(chan struct{}, n)
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	for range 4 {
		session, err := conn.NewSession()
		if err != nil {
			b.Fatal(err)
		}
		receiver, err := session.NewReceiver(amqp.LinkSourceAddress(rabbit.Queue(queue)), amqp.LinkCredit(1000))
		if err != nil {
			b.Fatal(err)
		}
		workers.Go(func() {
			for {
				if _, err := receiver.Receive(ctx); err != nil { // it accepts too
					return
				}
				accepted <- struct{}{}
			}
		})
	}
	for range n {
		select {
		case <-accepted:
		case <-time.After(time.Minute):
			b.Fatal("a bare client gets nothing any more")
		}
	}
}
