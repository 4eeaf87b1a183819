// Package api is Isobar's HTTP interface, the same at the ingress and at the publisher.
package api

import (
	"context"
	_ "embed"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/go-json-experiment/json/jsontext"

	"isobar.dev/events"
	"isobar.dev/internal/problem"
	"isobar.dev/internal/serve"
)

//go:embed openapi.yaml
var openAPI []byte

// timeout bounds how long a request waits for the brokers' word. A publisher that must start first fits into it.
const timeout = 15 * time.Second

// Publish hands on the events of one request. It returns nil when every one of them is promised, a *NotNow when none
// can be taken, a rule's error of package events, or any other error when nothing is certain.
type Publish func(ctx context.Context, reports []event.Event) error

// NotNow is the error for what can be taken later.
type NotNow struct {
	Busy       bool // too much is under way (429), rather than something being away (503)
	Detail     string
	RetryAfter time.Duration
}

func (e *NotNow) Error() string { return e.Detail }

// Handler serves POST / and POST /reports, and GET /openapi.yaml.
func Handler(publish Publish) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/", "/reports":
			if serve.Allow(w, r, http.MethodPost) {
				accept(w, r, publish)
			}
		case "/openapi.yaml":
			if serve.Allow(w, r, http.MethodGet, http.MethodHead) {
				w.Header().Set("Content-Type", "application/yaml")
				_, _ = w.Write(openAPI)
			}
		default:
			problem.Write(w, problem.Details{
				Status: http.StatusNotFound,
				Detail: "there is POST /reports (or /), GET /openapi.yaml, GET /health and GET /readyz",
			})
		}
	})
}

func accept(w http.ResponseWriter, r *http.Request, publish Publish) {
	body, err := readBody(w, r)
	if err != nil {
		return
	}
	reports, err := events.ReadRequest(r, body, time.Now())
	if err != nil {
		Refuse(w, err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	if err := publish(ctx, reports); err != nil {
		postpone(w, r, reports, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	answer := append([]byte(`{"reports":`), identities(reports)...)
	_, _ = w.Write(append(answer, '}', '\n'))
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := ReadBody(w, r, events.MaxBody)
	if err != nil {
		Refuse(w, err)
	}
	return body, err
}

// ReadBody reads a body of at most limit bytes. A larger one is an *http.MaxBytesError, of which Refuse makes a 413.
func ReadBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength > limit {
		w.Header().Set("Connection", "close") // rather than read what will be thrown away
		return nil, &http.MaxBytesError{Limit: limit}
	}
	reader := http.MaxBytesReader(w, r.Body, limit)
	if r.ContentLength < 0 {
		return io.ReadAll(reader)
	}
	body := make([]byte, r.ContentLength)
	_, err := io.ReadFull(reader, body)
	return body, err
}

// Refuse answers a request that cannot be taken as it is: 400, 413, 415 or 422, by the error of package events. A broken
// rule is spelled out in the members field, value, rule and, for one of several reports, index.
func Refuse(w http.ResponseWriter, err error) {
	p := problem.Details{Status: http.StatusBadRequest, Detail: err.Error(), Members: map[string]any{}}
	if indexed, ok := errors.AsType[*events.Indexed](err); ok {
		p.Members["index"] = indexed.Index
	}
	if broken, ok := errors.AsType[*events.Violation](err); ok {
		p.Status = http.StatusUnprocessableEntity
		for name, text := range map[string]string{"field": broken.Field, "value": broken.Value, "rule": broken.Rule} {
			if text != "" {
				p.Members[name] = text
			}
		}
	} else if _, ok := errors.AsType[*events.UnsupportedMediaType](err); ok {
		p.Status = http.StatusUnsupportedMediaType
		w.Header().Set("Accept-Post", "application/json, application/cloudevents+json, application/cloudevents-batch+json")
	} else if _, ok := errors.AsType[*events.TooMany](err); ok {
		p.Status = http.StatusRequestEntityTooLarge
	} else if large, ok := errors.AsType[*http.MaxBytesError](err); ok {
		p.Status = http.StatusRequestEntityTooLarge
		p.Detail = "the body must have at most " + strconv.FormatInt(large.Limit, 10) + " bytes"
	} else if _, ok := errors.AsType[*events.Malformed](err); !ok {
		p.Detail = "the body could not be read: " + err.Error()
	}
	problem.Write(w, p)
}

// postpone answers that nothing is promised, with the identities under which it is safe to send again.
func postpone(w http.ResponseWriter, r *http.Request, reports []event.Event, err error) {
	p := problem.Details{
		Status:     http.StatusServiceUnavailable,
		RetryAfter: time.Second,
		Members:    map[string]any{"reports": jsonValue(identities(reports))},
	}
	var broken *events.Violation
	if errors.As(err, &broken) {
		Refuse(w, err)
		return
	}
	notNow, ok := errors.AsType[*NotNow](err)
	switch {
	case ok:
		p.Detail = notNow.Detail
		if notNow.RetryAfter > 0 {
			p.RetryAfter = notNow.RetryAfter
		}
		if notNow.Busy {
			p.Status = http.StatusTooManyRequests
		}
	case errors.Is(err, context.DeadlineExceeded):
		p.Detail = "the brokers have not confirmed in time"
	case r.Context().Err() != nil:
		p.Detail = "the request was given up"
	default:
		slog.Warn("not published", "error", err)
		p.Detail = "the reports could not be published"
	}
	p.Detail += "; nothing is promised, and it is safe to send them again under the same source and id"
	problem.Write(w, p)
}

type jsonValue []byte

func (v jsonValue) MarshalJSON() ([]byte, error) { return v, nil }

// identities is the JSON array of the source and id of each report.
func identities(reports []event.Event) []byte {
	b := make([]byte, 0, 100*len(reports))
	for i := range reports {
		separator := byte(',')
		if i == 0 {
			separator = '['
		}
		b = append(b, separator)
		b = append(b, `{"source":`...)
		b, _ = jsontext.AppendQuote(b, reports[i].Source())
		b = append(b, `,"id":`...)
		b, _ = jsontext.AppendQuote(b, reports[i].ID())
		b = append(b, '}')
	}
	return append(b, ']')
}
