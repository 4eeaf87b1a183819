package events

import (
	"mime"
	"net/url"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
)

const (
	// Type is the CloudEvents type of a weather report.
	Type = "dev.isobar.weather.report.v1"
	// DefaultSource is the CloudEvents source of a report that came without one: plain JSON.
	DefaultSource = "https://isobar.dev/reports"

	// TraceParent is the attribute of CloudEvents' distributed tracing extension.
	TraceParent = "traceparent"
	// TraceState is the other one.
	TraceState = "tracestate"

	jsonMediaType = "application/json"
)

// Limits of an event, in bytes. MaxEvent is for data and attributes together; it is what CloudEvents asks every
// intermediary to forward, and well below what Kafka takes as one record by default (1 MiB).
const (
	MaxID     = 256
	MaxSource = 512
	MaxEvent  = 64 << 10
)

var (
	defaultSource = mustParseURIRef(DefaultSource)
	jsonType      = jsonMediaType
)

func mustParseURIRef(s string) types.URIRef {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return types.URIRef{URL: *u}
}

// New returns the event that carries a plain report, under DefaultSource.
func New(r Report, id string, at time.Time) event.Event {
	country := r.Country
	return event.Event{
		Context: &event.EventContextV1{
			ID:              id,
			Source:          defaultSource,
			Type:            Type,
			Subject:         &country,
			Time:            &types.Timestamp{Time: at.UTC()},
			DataContentType: &jsonType,
		},
		DataEncoded: r.AppendJSON(make([]byte, 0, 48+len(r.Description)+len(r.Weather))),
	}
}

// The rules of an event, as a sender is told them.
const (
	ruleID       = "must be a string of 1 to 256 bytes without white space at its ends"
	ruleSource   = "must be a URI reference of 1 to 512 bytes"
	ruleType     = `must be "` + Type + `"`
	ruleSubject  = "must be the report's country, or absent"
	ruleDataType = "must be application/json, or absent"
	ruleData     = "is missing: it must be a report like " + `{"description":"Test","country":"GT","weather":"Sunny"}`
	ruleYear     = "must be in the years 0000 to 9999 in UTC"
	ruleEvent    = "the event must have at most 65536 bytes"
)

// Normalize checks that the event is one that Isobar counts, and writes what it carries in the one form that travels:
// the country in upper case, the subject the country, the data JSON without unknown fields, a time (now where there is
// none). The error is a *Malformed or a *Violation, and the event is then as it was.
func Normalize(e *event.Event, now time.Time) error {
	ctx, ok := e.Context.(*event.EventContextV1)
	if !ok {
		return violation("specversion", quote(e.SpecVersion()), ruleSpecVersion)
	}
	if err := checkIdentity(ctx.Source.String(), ctx.ID); err != nil {
		return err
	}
	if ctx.ID != strings.TrimSpace(ctx.ID) { // the SDK takes it away, and it would be another id on the way over Kafka
		return violation("id", quote(ctx.ID), ruleID)
	}
	if ctx.Type != Type {
		return violation("type", quote(ctx.Type), ruleType)
	}
	if ctx.DataContentType != nil && !isJSON(*ctx.DataContentType) {
		return violation("datacontenttype", quote(*ctx.DataContentType), ruleDataType)
	}
	if ctx.Time != nil {
		// As text, which is what travels, another year is no timestamp.
		if year := ctx.Time.UTC().Year(); year < 0 || year > 9999 {
			return violation("time", quote(ctx.Time.Format(time.RFC3339)), ruleYear)
		}
	}
	if _, has := ctx.Extensions["data"]; has { // the SDK lets it be set, though JSON has no place for it
		return violation("data", nil, ruleName)
	}
	if size(e, ctx) > MaxEvent {
		return violation("", nil, ruleEvent)
	}
	if len(e.DataEncoded) == 0 {
		return violation("data", nil, ruleData)
	}
	r, err := ParseReport(e.DataEncoded)
	if err != nil {
		return err
	}
	if ctx.Subject != nil && !strings.EqualFold(*ctx.Subject, r.Country) {
		return violation("subject", quote(*ctx.Subject), ruleSubject)
	}
	ctx.Subject = &r.Country
	ctx.DataContentType = &jsonType
	if ctx.Time == nil {
		ctx.Time = &types.Timestamp{Time: now.UTC()}
	}
	e.DataEncoded = r.AppendJSON(nil)
	e.DataBase64 = false
	return nil
}

func checkIdentity(source, id string) error {
	switch {
	case id == "":
		return violation("id", nil, "is missing: it "+ruleID)
	case len(id) > MaxID:
		return violation("id", quote(id), ruleID)
	case source == "":
		return violation("source", nil, "is missing: it "+ruleSource)
	case len(source) > MaxSource:
		return violation("source", quote(source), ruleSource)
	}
	return nil
}

// size is what the event weighs, in bytes, without JSON's quotes and names.
func size(e *event.Event, ctx *event.EventContextV1) int {
	n := len(e.DataEncoded) + len(ctx.ID) + len(ctx.Type)
	if ctx.DataSchema != nil {
		n += len(ctx.DataSchema.String())
	}
	if ctx.Subject != nil {
		n += len(*ctx.Subject)
	}
	for name, value := range ctx.Extensions {
		n += len(name) + 16
		if text, ok := value.(string); ok {
			n += len(text)
		}
	}
	return n
}

// isJSON reports whether data of the content type is JSON in UTF-8.
func isJSON(contentType string) bool {
	if contentType == jsonMediaType {
		return true
	}
	mediaType, parameters, err := mime.ParseMediaType(contentType)
	if err != nil || !jsonMedia(mediaType) {
		return false
	}
	charset, given := parameters["charset"]
	return !given || strings.EqualFold(charset, "utf-8")
}

func jsonMedia(mediaType string) bool {
	return mediaType == jsonMediaType || mediaType == "text/json" || strings.HasSuffix(mediaType, "+json")
}

// Trace adds the trace context of a request to an event that has none of its own.
// A traceparent that is not of the W3C form is ignored, as that specification asks.
func Trace(e *event.Event, traceparent, tracestate string) {
	if !validTraceParent(traceparent) {
		return
	}
	extensions := e.Extensions()
	if _, has := extensions[TraceParent]; has {
		return
	}
	e.SetExtension(TraceParent, traceparent)
	if tracestate != "" && len(tracestate) <= 512 && printable(tracestate) {
		e.SetExtension(TraceState, tracestate)
	}
}

// printable reports whether s is printable ASCII, as a tracestate must be: other bytes may be no UTF-8, which gRPC refuses
// for the whole call.
func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// validTraceParent is for version 00 of the W3C's Trace Context: 00-<32 hex>-<16 hex>-<2 hex>, the ids not all zero.
func validTraceParent(s string) bool {
	const form = "00-iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii-ssssssssssssssss-ff"
	if len(s) != len(form) || s[3:35] == form0[:32] || s[36:52] == form0[:16] {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch f := form[i]; {
		case f == '-' || i < 2:
			if c != f {
				return false
			}
		case (c < '0' || c > '9') && (c < 'a' || c > 'f'):
			return false
		}
	}
	return true
}

const form0 = "00000000000000000000000000000000"
