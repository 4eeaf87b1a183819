package counts_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/counts"
	"isobar.dev/events"
)

// BenchmarkCount counts batches of 200 reports, two of them at a time, on servers that write to disk before they answer:
// with an empty store, and with one that remembers 400,000 ids in four older sets.
func BenchmarkCount(b *testing.B) {
	const size = 200
	both(b, func(b *testing.B, k kind) {
		for _, older := range []int{0, 4} {
			b.Run(fmt.Sprintf("%d older sets", older), func(b *testing.B) {
				p := k.server(b)
				store, c := k.open(b, p.Addr()), look(b, p.Addr())
				for i := range older {
					for n := 0; n < 100_000; n += 1000 {
						must(b, store.Count(b.Context(), arrivals(fmt.Sprint("older", i), n, 1000)))
					}
					must(b, c.Rename(b.Context(), "messages:seen:1", fmt.Sprint("messages:seen:", 5+i)).Err())
				}
				series := fmt.Sprint(time.Now().UnixNano())
				var next atomic.Int64
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := store.Count(context.Background(), arrivals(series, int(next.Add(size)), size)); err != nil {
							b.Error(err)
						}
					}
				})
				b.ReportMetric(float64(b.N)*size/b.Elapsed().Seconds(), "reports/s")
			})
		}
	})
}

// nothing is a store that counts nothing, to see what the rest costs.
type nothing struct{ counts.Store }

func (nothing) Count(context.Context, []events.Arrival) error { return nil }

// BenchmarkHandler takes batches of 100 reports by HTTP, through a real connection, and counts them nowhere: what is left
// is what the writer itself does, and the client.
func BenchmarkHandler(b *testing.B) {
	const size = 100
	handler, err := counts.NewHandler(nothing{}, 1000)
	must(b, err)
	body, contentType := batch(arrivals("bench", 0, size))
	for _, wire := range []bool{false, true} {
		b.Run(map[bool]string{false: "called", true: "over HTTP"}[wire], func(b *testing.B) {
			s := httptest.NewServer(handler)
			defer s.Close()
			b.ReportAllocs()
			for b.Loop() {
				if wire {
					res, err := http.Post(s.URL, contentType, bytes.NewReader(body))
					must(b, err)
					_, _ = io.Copy(io.Discard, res.Body)
					_ = res.Body.Close()
					continue
				}
				r := httptest.NewRequest(http.MethodPost, "/", bytes.NewReader(body))
				r.Header.Set("Content-Type", contentType)
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, r)
				if w.Code != http.StatusNoContent {
					b.Fatal(w.Code, w.Body)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/size, "ns/report")
		})
	}
}

// batch is the body of a request with these arrivals, and its content type.
func batch(all []events.Arrival) (body []byte, contentType string) {
	batch := make([]event.Event, 0, len(all))
	for _, a := range all {
		batch = append(batch, events.New(a.Report, a.ID, time.Now()))
	}
	return events.WriteBatch(batch)
}
