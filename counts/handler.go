package counts

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"isobar.dev/events"
	"isobar.dev/internal/group"
	"isobar.dev/internal/problem"
	"isobar.dev/internal/serve"
)

// Limits of a request.
const (
	MaxBody   = 4 << 20 // bytes
	MaxEvents = 5_000
)

const (
	// patience is how long a caller is kept waiting, from the first byte of its body on.
	patience = 10 * time.Second
	// commitTimeout bounds one batch: go-redis tries twice.
	commitTimeout = 2*answerTimeout + time.Second
	// memory is the most bytes of bodies that are being read or counted at once. The others are not read yet.
	memory = 2 * MaxBody
)

// Handler takes events by HTTP, as Knative's sources and the project's own post them: POST / with one CloudEvent in binary
// or structured mode, or a CloudEvents batch. It answers
//
//   - 204 when the store has counted what was sent;
//   - 400 for what is malformed and 422 for what breaks a rule; of a batch then nothing is counted, and the member index
//     of the problem document is the place of the event in it;
//   - 413 and 415 for what is too large or of another kind, and 404 and 405;
//   - 503 with Retry-After for everything that may pass. It may have been counted: sending the same again is safe.
type Handler struct {
	group *group.Committer[events.Arrival]
	room  *semaphore.Weighted
}

// NewHandler returns a Handler that counts in store. GroupSize is the most reports that are gathered for one call of it,
// but for a request that brings more; with 1 nothing is gathered.
func NewHandler(store Store, groupSize int) (*Handler, error) {
	if groupSize < 1 || groupSize > MaxEvents {
		return nil, fmt.Errorf("GROUP_SIZE must be between 1 and %d, not %d", MaxEvents, groupSize)
	}
	// A second batch is sent while the store writes the first one to its disk. More of them would only be smaller, but
	// where nothing is gathered, being small is what is asked for.
	inFlight := 2
	if groupSize == 1 {
		inFlight = poolSize
	}
	return &Handler{
		group: group.New(group.Options[events.Arrival]{
			Commit:   func(ctx context.Context, batch []events.Arrival) error { return store.Count(ctx, batch) },
			Batch:    groupSize,
			InFlight: inFlight,
			Waiting:  10 * MaxEvents, // more than there is room for, unless the events are very small
			Timeout:  commitTimeout,
			Alone: func(err error) bool {
				f, ok := errors.AsType[*Failure](err)
				return ok && f.Contents
			},
		}),
		room: semaphore.NewWeighted(memory),
	}, nil
}

// Close waits until what has been taken is counted or refused. Nothing more is taken then.
func (h *Handler) Close() { h.group.Close() }

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/" {
		problem.Write(w, problem.Details{Status: http.StatusNotFound, Detail: "events are taken at /, not at " + r.URL.Path})
		return
	}
	if !serve.Allow(w, r, http.MethodPost) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	if err := h.count(ctx, w, r); err != nil {
		problem.Write(w, details(err))
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// count reads a request, as soon as there is room for it, and counts what it brings.
func (h *Handler) count(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
	size := r.ContentLength
	if size > MaxBody {
		return &http.MaxBytesError{Limit: MaxBody}
	}
	if size < 0 {
		size = MaxBody
	}
	if err := h.room.Acquire(ctx, size); err != nil {
		return err
	}
	defer h.room.Release(size)
	arrivals, err := read(ctx, w, r)
	if err != nil {
		return err
	}
	return h.group.Commit(ctx, arrivals...)
}

// read returns the arrivals of a request, with nothing in them that counting does not need.
func read(ctx context.Context, w http.ResponseWriter, r *http.Request) ([]events.Arrival, error) {
	// A caller that sends slowly must not keep the room from the others. Where the deadline can't be set there is no
	// connection that could be slow.
	deadline, _ := ctx.Deadline()
	_ = http.NewResponseController(w).SetReadDeadline(deadline)
	body := bodies.Get().(*bytes.Buffer)
	defer func() {
		const kept = 256 << 10
		if body.Cap() <= kept {
			body.Reset()
			bodies.Put(body)
		}
	}()
	if r.ContentLength > 0 {
		body.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	if _, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, MaxBody)); err != nil {
		return nil, &unread{err}
	}
	arrivals, err := events.ReadArrivals(r, body.Bytes())
	if err != nil {
		return nil, err
	}
	if len(arrivals) > MaxEvents {
		return nil, &tooMany{len(arrivals)}
	}
	for i := range arrivals {
		arrivals[i].Report.Description = "" // it would only take memory while it waits
	}
	return arrivals, nil
}

var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// unread is the error for a body that could not be read to its end.
type unread struct{ err error }

func (e *unread) Error() string { return "read the body: " + e.err.Error() }
func (e *unread) Unwrap() error { return e.err }

// tooMany is the error for a batch of more than MaxEvents.
type tooMany struct{ got int }

func (e *tooMany) Error() string {
	return fmt.Sprintf("a batch must have at most %d events, not %d", MaxEvents, e.got)
}

// details says what a caller is told. Whatever is not the request's fault is 503: to Knative's RabbitMQ source a 500
// would be the event's end.
func details(err error) problem.Details {
	d := problem.Details{Status: http.StatusServiceUnavailable, Detail: err.Error(), RetryAfter: time.Second}
	refuse := func(status int) { d.Status, d.RetryAfter = status, 0 }
	if at, ok := errors.AsType[*events.Indexed](err); ok {
		d.Members = map[string]any{"index": at.Index}
	}
	var (
		malformed   *events.Malformed
		violation   *events.Violation
		unsupported *events.UnsupportedMediaType
		many        *tooMany
		large       *http.MaxBytesError
		unread      *unread
		failure     *Failure
	)
	switch {
	case errors.As(err, &malformed):
		refuse(http.StatusBadRequest)
	case errors.As(err, &violation):
		refuse(http.StatusUnprocessableEntity)
	case errors.As(err, &unsupported):
		refuse(http.StatusUnsupportedMediaType)
	case errors.As(err, &large):
		refuse(http.StatusRequestEntityTooLarge)
		d.Detail = fmt.Sprintf("a request must have at most %d bytes", MaxBody)
	case errors.As(err, &many):
		refuse(http.StatusRequestEntityTooLarge)
	case errors.As(err, &unread):
		// The connection broke or was too slow, which says nothing about the event.
		if errors.Is(err, io.ErrUnexpectedEOF) {
			d.Detail = "the body ended before its length was reached"
		}
	case errors.As(err, &failure):
		if failure.Lasting {
			d.RetryAfter = 10 * time.Second // somebody has to come and repair it
		}
	case errors.Is(err, context.DeadlineExceeded):
		d.Detail = fmt.Sprintf("not counted within %v, or not known to be", patience)
	case errors.Is(err, context.Canceled):
		d.Detail = "the caller has gone"
	}
	return d
}
