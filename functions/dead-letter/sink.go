package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/IBM/sarama"
	"golang.org/x/sync/semaphore"

	"isobar.dev/events"
	"isobar.dev/events/api"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/problem"
	"isobar.dev/internal/serve"
)

// Limits of a request, in bytes. The topic message takes 1 MiB as a record, which may have been compressed, and all of it
// may be headers.
const (
	maxLetter  = 8 << 20
	maxHeaders = 2 << 20
)

const (
	// together is the most bytes of letters that are read and sent at once, but for a single one that has more. It bounds
	// the memory, and what sarama sends together: Kafka takes a batch, as it does a record, up to the topic's
	// max.message.bytes.
	together = 512 << 10
	// patience is how long a caller is kept waiting.
	patience = 10 * time.Second
)

// sink keeps dead letters in a topic of Kafka. It takes POST / with one CloudEvent in binary or structured mode, or a
// batch of them, of any type and with any data, and answers
//
//   - 204 when all in-sync replicas have what was sent;
//   - 400, 413, 415 and 422 for what is no CloudEvent or has more than maxLetter bytes, which is then lost, and 404 and 405;
//   - 503 with Retry-After for everything that may pass. It may have been stored.
//
// What is posted twice may be stored twice: Knative's sources send again what they have no answer to.
type sink struct {
	sender *kafka.Sender
	topic  string
	room   *semaphore.Weighted
}

func newSink(sender *kafka.Sender, topic string) *sink {
	return &sink{sender: sender, topic: topic, room: semaphore.NewWeighted(together)}
}

// ServeHTTP implements http.Handler.
func (s *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/" {
		problem.Write(w, problem.Details{Status: http.StatusNotFound, Detail: "dead letters are taken at /, not at " + r.URL.Path})
		return
	}
	if !serve.Allow(w, r, http.MethodPost) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	size := weight(r)
	if err := s.room.Acquire(ctx, size); err != nil {
		postpone(w, errors.New("too many dead letters are under way"))
		return
	}
	defer s.room.Release(size)

	// A caller that sends slowly must not keep the room from the others. Where the deadline can't be set there is no
	// connection that could be slow.
	deadline, _ := ctx.Deadline()
	_ = http.NewResponseController(w).SetReadDeadline(deadline)
	body, err := api.ReadBody(w, r, maxLetter)
	if _, large := errors.AsType[*http.MaxBytesError](err); err != nil && !large {
		postpone(w, err) // the connection broke or was too slow, which says nothing about the letter
		return
	}
	var letters []*sarama.ProducerMessage
	if err == nil {
		letters, err = events.ReadLetters(r.Header, body, s.topic)
	}
	if err != nil {
		slog.Error("a dead letter is refused, and lost", "error", err)
		api.Refuse(w, err)
		return
	}
	if err := s.sender.Send(ctx, letters...); err != nil {
		if !errors.Is(err, kafka.ErrAway) { // which has been said
			slog.Warn("dead letters are not stored", "error", err)
		}
		postpone(w, err)
		return
	}
	slog.Warn("put into the dead letters", "events", len(letters), "id", fmt.Sprintf("%.256s", r.Header.Get("Ce-Id")), "code", r.Header.Get("Ce-Knativeerrorcode"))
	w.WriteHeader(http.StatusNoContent)
}

func postpone(w http.ResponseWriter, err error) {
	problem.Write(w, problem.Details{Status: http.StatusServiceUnavailable, Detail: err.Error(), RetryAfter: time.Second})
}

// weight is what a request takes of the room.
func weight(r *http.Request) int64 {
	n := r.ContentLength
	if n < 0 {
		return together
	}
	for name, values := range r.Header {
		for _, value := range values {
			n += int64(len(name) + len(value))
		}
	}
	return min(n, together)
}
