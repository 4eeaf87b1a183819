package events

import (
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/google/uuid"
)

// Limits of a request.
const (
	MaxReports = 1000
	MaxBody    = 1 << 20 // bytes
)

// Media types of a request.
const (
	structuredMediaType = "application/cloudevents+json"
	batchMediaType      = "application/cloudevents-batch+json"
)

// UnsupportedMediaType is the error for a body of a kind that is not read here.
type UnsupportedMediaType struct{ Got string }

func (e *UnsupportedMediaType) Error() string {
	got := e.Got
	if got == "" {
		got = "none"
	}
	return "the content type must be application/json, " + structuredMediaType + " or " + batchMediaType +
		" in UTF-8 without a content encoding, not " + got
}

// TooMany is the error for a request with more than MaxReports reports.
type TooMany struct{ Got int }

func (e *TooMany) Error() string {
	return fmt.Sprintf("a request must carry at most %d reports, not %d", MaxReports, e.Got)
}

// mode is how a request carries what it carries.
type mode int

const (
	plain mode = iota
	binary
	structured
	batch
)

func requestMode(h http.Header) (mode, error) {
	contentType := h.Get("Content-Type")
	if encoding := h.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return 0, &UnsupportedMediaType{fmt.Sprintf("%s with the content encoding %s", contentType, encoding)}
	}
	if h.Get("Ce-Specversion") != "" {
		if mediaType, _, _ := mime.ParseMediaType(contentType); strings.HasPrefix(mediaType, "application/cloudevents") {
			return 0, &Malformed{"CloudEvent", "ce-specversion says binary mode, content-type " + mediaType + " says structured: send one of them"}
		}
		return binary, nil
	}
	if h.Get("Ce-Id") != "" { // taken as plain, it would be counted under an id that its sender doesn't know
		return 0, &Malformed{"CloudEvent", `there is a ce-id but no ce-specversion: it must be "1.0"`}
	}
	if contentType == jsonMediaType {
		return plain, nil
	}
	mediaType, parameters, err := mime.ParseMediaType(contentType)
	if charset, given := parameters["charset"]; err != nil || given && !strings.EqualFold(charset, "utf-8") {
		return 0, &UnsupportedMediaType{contentType}
	}
	switch mediaType {
	case jsonMediaType:
		return plain, nil
	case structuredMediaType:
		return structured, nil
	case batchMediaType:
		return batch, nil
	}
	return 0, &UnsupportedMediaType{contentType}
}

// ReadRequest reads the reports of a request, whose body has been read already, as events in the form that travels
// (see Normalize). A plain report without an Idempotency-Key gets a UUIDv7; those of an array get KEY/INDEX.
// The trace context of the request goes to every event without one.
//
// The error is a *Malformed, a *Violation, an *UnsupportedMediaType or a *TooMany, the first two as an *Indexed where
// they concern one of several. Then no event is returned.
func ReadRequest(r *http.Request, body []byte, now time.Time) ([]event.Event, error) {
	events, err := readRequest(r, body, now)
	if err != nil {
		return nil, err
	}
	if traceparent := r.Header.Get("Traceparent"); traceparent != "" {
		tracestate := strings.Join(r.Header.Values("Tracestate"), ",")
		for i := range events {
			Trace(&events[i], traceparent, tracestate)
		}
	}
	return events, nil
}

func readRequest(r *http.Request, body []byte, now time.Time) ([]event.Event, error) {
	how, err := requestMode(r.Header)
	if err != nil {
		return nil, err
	}
	switch how {
	case binary:
		e, err := readBinary(r.Header, body)
		if err == nil {
			err = Normalize(&e, now)
		}
		return []event.Event{e}, err
	case structured:
		e, err := Parse(body)
		if err == nil {
			err = Normalize(&e, now)
		}
		return []event.Event{e}, err
	case batch:
		return readMany(body, "CloudEvents batch", ruleBatch, func() func(*decoder, int) (event.Event, error) {
			var v envelope
			return func(d *decoder, _ int) (event.Event, error) {
				if err := d.envelope(body, &v); err != nil {
					return event.Event{}, err
				}
				e, err := v.event()
				if err == nil {
					err = Normalize(&e, now)
				}
				return e, err
			}
		}())
	}
	return readPlain(r.Header, body, now)
}

func readPlain(h http.Header, body []byte, now time.Time) ([]event.Event, error) {
	key, err := idempotencyKey(h)
	if err != nil {
		return nil, err
	}
	d := decode(body)
	kind := d.PeekKind()
	d.free()
	if kind == '[' {
		return readMany(body, "array of reports", ruleReport, func(d *decoder, i int) (event.Event, error) {
			r, err := d.report()
			if err != nil {
				return event.Event{}, err
			}
			if key != "" {
				return New(r, key+"/"+strconv.Itoa(i), now), nil
			}
			return New(r, newID(), now), nil
		})
	}
	r, err := ParseReport(body)
	if err != nil {
		return nil, err
	}
	if key == "" {
		key = newID()
	}
	return []event.Event{New(r, key, now)}, nil
}

// readMany reads a JSON array of which each element is an event. What follows a broken rule is read all the same, so
// that a request that is both broken JSON and against a rule is told that it is broken JSON.
func readMany(body []byte, what, rule string, read func(d *decoder, index int) (event.Event, error)) ([]event.Event, error) {
	var events []event.Event
	var first *Indexed
	n := 0
	err := each(body, what, rule, func(d *decoder, i int) error {
		n++
		if n > MaxReports || first != nil {
			return d.SkipValue()
		}
		e, err := read(d, i)
		if err != nil {
			if _, ok := errors.AsType[*Violation](err); !ok {
				return err
			}
			first = &Indexed{i, err}
			return nil
		}
		events = append(events, e)
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case n > MaxReports:
		return nil, &TooMany{n}
	case first != nil:
		return nil, first
	case n == 0:
		return nil, violation("", []byte("[]"), "an array must have at least one element")
	}
	return events, nil
}

// newID returns a UUIDv7: the ids of one time stand together wherever they are sorted.
func newID() string { return uuid.Must(uuid.NewV7()).String() }

// maxKey leaves room for the index of an array.
const maxKey = MaxID - len("/999")

// idempotencyKey reads the header of the IETF's draft, a string of RFC 8941 ("key"); the bare key that most clients
// send is taken too.
func idempotencyKey(h http.Header) (string, error) {
	values := h.Values("Idempotency-Key")
	if len(values) == 0 {
		return "", nil
	}
	const rule = `must be one string of 1 to 252 printable ASCII characters without spaces at its ends, like "8e03978e-40d5"`
	key := strings.Trim(values[0], " \t")
	bad := violation("Idempotency-Key", quote(key), rule)
	if len(values) > 1 {
		return "", bad
	}
	if strings.HasPrefix(key, `"`) {
		if len(key) < 2 || !strings.HasSuffix(key, `"`) {
			return "", bad
		}
		var b strings.Builder
		for i, inner := 0, key[1:len(key)-1]; i < len(inner); i++ {
			switch inner[i] {
			case '"':
				return "", bad
			case '\\':
				i++
				if i == len(inner) || inner[i] != '"' && inner[i] != '\\' {
					return "", bad
				}
			}
			b.WriteByte(inner[i])
		}
		key = b.String()
	}
	if key == "" || strings.TrimSpace(key) != key || len(key) > maxKey || !printable(key) {
		return "", bad
	}
	return key, nil
}

// readBinary reads an event of which the attributes are headers.
func readBinary(h http.Header, body []byte) (event.Event, error) {
	v := envelope{}
	decode := unescape
	if h.Get("Ce-Knativekafkaoffset") != "" { // KafkaSource's: decoded, one id may become another
		decode = literal
	}
	for name, values := range h {
		attribute, is := strings.CutPrefix(strings.ToLower(name), "ce-")
		if !is {
			continue
		}
		if len(values) > 1 {
			return event.Event{}, violation("ce-"+attribute, nil, "must stand once")
		}
		text := decode(values[0])
		value := appendString(nil, text)
		if !utf8.ValidString(text) { // with its bytes replaced, one id may become another
			return event.Event{}, violation("ce-"+attribute, value, "must be UTF-8")
		}
		switch slot := v.slot([]byte(`"` + attribute + `"`)); {
		case attribute == "data" || attribute == "data_base64" || attribute == "datacontenttype":
			return event.Event{}, violation("ce-"+attribute, value, "is no attribute of binary mode: the body is the data and content-type its type")
		case slot != nil:
			*slot = value
		default:
			v.extensions = append(v.extensions, member{attribute, value})
		}
	}
	if contentType := h.Get("Content-Type"); contentType != "" {
		v.dataContentType = appendString(nil, contentType)
	}
	e, err := v.event()
	e.DataEncoded = body
	return e, err
}

// unescape decodes the percent-encoding that CloudEvents' HTTP binding prescribes for header values; a percent sign
// that begins none is left as it is.
func unescape(s string) string {
	if strings.IndexByte(s, '%') < 0 {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b = append(b, byte(c))
				i += 2
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}

// ReadArrivals reads what a source posts to a writer: one event in binary or structured mode, or a batch. Its errors
// are ReadRequest's. What Knative's sources make of a message that is no CloudEvent has no content type: it is JSON.
func ReadArrivals(r *http.Request, body []byte) ([]Arrival, error) {
	how, err := requestMode(r.Header)
	if err != nil {
		return nil, err
	}
	var e event.Event
	switch how {
	case batch:
		return ParseArrivals(body)
	case structured:
		e, err = Parse(body)
	case binary:
		e, err = readBinary(r.Header, body)
	default:
		return nil, &UnsupportedMediaType{r.Header.Get("Content-Type") + " without a ce-specversion"}
	}
	if err != nil {
		return nil, err
	}
	a, err := ParseArrival(&e)
	return []Arrival{a}, err
}

// WriteBatch returns the body and the content type of a CloudEvents batch.
func WriteBatch(events []event.Event) (body []byte, contentType string) {
	body = append(body, '[')
	for i := range events {
		if i > 0 {
			body = append(body, ',')
		}
		body = AppendJSON(body, &events[i])
	}
	return append(body, ']'), batchMediaType
}
