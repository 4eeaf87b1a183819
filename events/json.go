package events

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"github.com/go-json-experiment/json/jsontext"
)

// JSON is read and written here, and not by the SDK, because it is the hot path of every hop and because the SDK's
// reader panics on some bad input (v2.16.2: a data_base64 that is a number).

const (
	ruleEnvelope    = "a CloudEvent must be a JSON object"
	ruleSpecVersion = `must be "1.0"`
	ruleTime        = "must be an RFC 3339 timestamp"
	ruleSchema      = "must be an absolute URI"
	ruleText        = "must be a string"
	ruleExtension   = "must be a string, a boolean or an integer of 32 bits"
	ruleName        = "is no attribute name: it must consist of lower-case letters and digits"
	ruleBase64      = "must be a base64 string"
	ruleOneData     = "must not stand beside data"
	ruleBatch       = "a batch must be a JSON array of CloudEvents"
)

// envelope is a CloudEvent in JSON, its members still as they stand in the input; absent and null ones are nil.
type envelope struct {
	specVersion, id, source, typ, subject, time, dataContentType, dataSchema, data, dataBase64 []byte

	extensions []member
}

type member struct {
	name  string
	value []byte
}

func (v *envelope) slot(name []byte) *[]byte {
	switch string(name) {
	case `"specversion"`:
		return &v.specVersion
	case `"id"`:
		return &v.id
	case `"source"`:
		return &v.source
	case `"type"`:
		return &v.typ
	case `"subject"`:
		return &v.subject
	case `"time"`:
		return &v.time
	case `"datacontenttype"`:
		return &v.dataContentType
	case `"dataschema"`:
		return &v.dataSchema
	case `"data"`:
		return &v.data
	case `"data_base64"`:
		return &v.dataBase64
	}
	return nil
}

// envelope reads the next value of input, which d reads.
func (d *decoder) envelope(input []byte, v *envelope) error {
	*v = envelope{extensions: v.extensions[:0]}
	if d.PeekKind() != '{' {
		value, err := d.ReadValue()
		if err != nil {
			return err
		}
		return violation("", value, ruleEnvelope)
	}
	if _, err := d.ReadToken(); err != nil {
		return err
	}
	for d.PeekKind() != '}' {
		name, err := d.name()
		if err != nil {
			return err
		}
		slot := v.slot(name)
		var extension string
		if slot == nil {
			extension = unquote(name)
		}
		value, err := d.ReadValue()
		if err != nil {
			return err
		}
		if value.Kind() == 'n' {
			continue
		}
		end := d.InputOffset()
		stays := input[end-int64(len(value)) : end] // value itself is the decoder's, and soon something else
		if slot != nil {
			*slot = stays
		} else {
			v.extensions = append(v.extensions, member{extension, stays})
		}
	}
	_, err := d.ReadToken()
	return err
}

// unquote decodes a valid JSON string.
func unquote(quoted []byte) string {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return string(quoted[1 : len(quoted)-1])
	}
	text, _ := jsontext.AppendUnquote(nil, quoted)
	return string(text)
}

// text decodes a member that must be a string and not empty; absent is empty.
func text(field string, value []byte, rule string) (string, error) {
	if value == nil {
		return "", nil
	}
	if value[0] != '"' || len(value) == 2 {
		return "", violation(field, value, rule)
	}
	return unquote(value), nil
}

// identity checks the members that every event must have.
func (v *envelope) identity() (source, id, typ string, err error) {
	if string(v.specVersion) != `"1.0"` {
		if v.specVersion == nil {
			return "", "", "", &Malformed{"CloudEvent", `specversion is missing: it must be "1.0"`}
		}
		return "", "", "", violation("specversion", v.specVersion, ruleSpecVersion)
	}
	if id, err = text("id", v.id, ruleID); err != nil {
		return "", "", "", err
	}
	if source, err = text("source", v.source, ruleSource); err != nil {
		return "", "", "", err
	}
	if id == "" || source == "" {
		return "", "", "", checkIdentity(source, id)
	}
	if typ, err = text("type", v.typ, ruleType); err != nil {
		return "", "", "", err
	}
	if typ == "" {
		return "", "", "", violation("type", nil, "is missing: it "+ruleType)
	}
	return source, id, typ, nil
}

// payload returns the data's bytes, which may share memory with the input; nil where there is none. Data that is said to
// be no JSON is what its string says.
func (v *envelope) payload() ([]byte, error) {
	if v.dataBase64 == nil {
		if v.data != nil && v.data[0] == '"' && v.dataContentType != nil && v.dataContentType[0] == '"' {
			mediaType, _, _ := strings.Cut(unquote(v.dataContentType), ";")
			if mediaType = strings.ToLower(strings.TrimSpace(mediaType)); mediaType != "" && !jsonMedia(mediaType) {
				return []byte(unquote(v.data)), nil
			}
		}
		return v.data, nil
	}
	if v.data != nil {
		return nil, violation("data_base64", v.dataBase64, ruleOneData)
	}
	if v.dataBase64[0] != '"' {
		return nil, violation("data_base64", v.dataBase64, ruleBase64)
	}
	data, err := base64.StdEncoding.DecodeString(unquote(v.dataBase64))
	if err != nil {
		return nil, violation("data_base64", v.dataBase64, ruleBase64)
	}
	return data, nil
}

func (v *envelope) event() (event.Event, error) {
	var none event.Event
	source, id, typ, err := v.identity()
	if err != nil {
		return none, err
	}
	ctx := &event.EventContextV1{ID: id, Type: typ, Source: defaultSource}
	if source != DefaultSource {
		u, err := url.Parse(source)
		if err != nil {
			return none, violation("source", v.source, ruleSource)
		}
		ctx.Source = types.URIRef{URL: *u}
	}
	if v.subject != nil {
		subject, err := text("subject", v.subject, ruleSubject)
		if err != nil {
			return none, err
		}
		ctx.Subject = &subject
	}
	if v.time != nil {
		text, err := text("time", v.time, ruleTime)
		if err != nil {
			return none, err
		}
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return none, violation("time", v.time, ruleTime)
		}
		ctx.Time = &types.Timestamp{Time: at}
	}
	if v.dataContentType != nil {
		contentType, err := text("datacontenttype", v.dataContentType, ruleDataType)
		if err != nil {
			return none, err
		}
		ctx.DataContentType = &contentType
	}
	if v.dataSchema != nil {
		schema, err := text("dataschema", v.dataSchema, ruleSchema)
		if err != nil {
			return none, err
		}
		u, err := url.Parse(schema)
		if err != nil || !u.IsAbs() {
			return none, violation("dataschema", v.dataSchema, ruleSchema)
		}
		ctx.DataSchema = &types.URI{URL: *u}
	}
	for _, m := range v.extensions {
		if err := setExtension(ctx, m); err != nil {
			return none, err
		}
	}
	data, err := v.payload()
	if err != nil {
		return none, err
	}
	return event.Event{Context: ctx, DataEncoded: data}, nil
}

func setExtension(ctx *event.EventContextV1, m member) error {
	for _, c := range []byte(m.name) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return violation(m.name, nil, ruleName)
		}
	}
	if m.name == "" {
		return violation(`""`, nil, ruleName)
	}
	if ctx.Extensions == nil {
		ctx.Extensions = make(map[string]any)
	}
	switch jsontext.Value(m.value).Kind() {
	case '"':
		ctx.Extensions[m.name] = unquote(m.value)
	case 't', 'f':
		ctx.Extensions[m.name] = m.value[0] == 't'
	default:
		n, err := strconv.ParseInt(string(m.value), 10, 32)
		if err != nil {
			return violation(m.name, m.value, ruleExtension)
		}
		ctx.Extensions[m.name] = int32(n)
	}
	return nil
}

// Parse reads one CloudEvent in JSON. The event may share memory with data. It is a CloudEvent 1.0 that may carry
// anything, at any length: Normalize tells whether it can be counted. The error is a *Malformed or a *Violation.
func Parse(data []byte) (event.Event, error) {
	d := decode(data)
	defer d.free()
	var v envelope
	if err := d.ended(d.envelope(data, &v)); err != nil {
		return event.Event{}, d.wrap("CloudEvent", err)
	}
	return v.event()
}

// Indexed is an error that concerns one element of an array. It is said of the first one that is wrong.
type Indexed struct {
	Index int
	Err   error
}

func (e *Indexed) Error() string { return fmt.Sprintf("element %d: %v", e.Index, e.Err) }
func (e *Indexed) Unwrap() error { return e.Err }

// each calls visit for every element of the JSON array input, until one fails.
func each(input []byte, what, rule string, visit func(d *decoder, index int) error) error {
	d := decode(input)
	defer d.free()
	if d.PeekKind() != '[' {
		value, err := d.ReadValue()
		if err != nil {
			return d.wrap(what, err)
		}
		return violation("", value, rule)
	}
	if _, err := d.ReadToken(); err != nil {
		return d.wrap(what, err)
	}
	for i := 0; d.PeekKind() != ']'; i++ {
		if err := visit(d, i); err != nil {
			return &Indexed{i, d.wrap(what, err)}
		}
	}
	if _, err := d.ReadToken(); err != nil {
		return d.wrap(what, err)
	}
	if err := d.end(); err != nil {
		return d.wrap(what, err)
	}
	return nil
}

// ParseBatch reads a CloudEvents batch in JSON, as Parse reads one. An error that concerns one event is an *Indexed.
func ParseBatch(data []byte) ([]event.Event, error) {
	var all []event.Event
	var v envelope
	err := each(data, "CloudEvents batch", ruleBatch, func(d *decoder, _ int) error {
		if err := d.envelope(data, &v); err != nil {
			return err
		}
		e, err := v.event()
		all = append(all, e)
		return err
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// AppendJSON appends a CloudEvent 1.0 in JSON. Data that is JSON stands as it is, anything else in base64.
func AppendJSON(b []byte, e *event.Event) []byte {
	ctx, ok := e.Context.(*event.EventContextV1)
	if !ok {
		ctx = e.Context.AsV1()
	}
	b = append(b, `{"specversion":"1.0","id":`...)
	b = appendString(b, ctx.ID)
	b = append(b, `,"source":`...)
	b = appendString(b, sourceOf(ctx))
	b = append(b, `,"type":`...)
	b = appendString(b, ctx.Type)
	if ctx.Subject != nil {
		b = append(b, `,"subject":`...)
		b = appendString(b, *ctx.Subject)
	}
	if ctx.Time != nil {
		b = append(b, `,"time":"`...)
		b = ctx.Time.AppendFormat(b, time.RFC3339Nano)
		b = append(b, '"')
	}
	if ctx.DataContentType != nil {
		b = append(b, `,"datacontenttype":`...)
		b = appendString(b, *ctx.DataContentType)
	}
	if ctx.DataSchema != nil {
		b = append(b, `,"dataschema":`...)
		b = appendString(b, ctx.DataSchema.String())
	}
	for name, value := range ctx.Extensions {
		b = append(b, ',', '"')
		b = append(b, name...)
		b = append(b, `":`...)
		switch value := value.(type) {
		case string:
			b = appendString(b, value)
		case bool:
			b = strconv.AppendBool(b, value)
		case int32:
			b = strconv.AppendInt(b, int64(value), 10)
		default: // a URI, a timestamp or bytes, all of which CloudEvents writes as strings
			text, _ := types.Format(value)
			b = appendString(b, text)
		}
	}
	if len(e.DataEncoded) > 0 {
		if (ctx.DataContentType == nil || isJSON(*ctx.DataContentType)) && jsontext.Value(e.DataEncoded).IsValid() {
			b = append(b, `,"data":`...)
			b = append(b, e.DataEncoded...)
		} else {
			b = append(b, `,"data_base64":"`...)
			b = base64.StdEncoding.AppendEncode(b, e.DataEncoded)
			b = append(b, '"')
		}
	}
	return append(b, '}')
}

// Arrival is what a writer needs of an event: its identity and the report.
type Arrival struct {
	Source, ID string
	Report     Report
}

// wrappers are the types under which Knative's sources hand on a message that is no CloudEvent.
var wrappers = []string{"dev.knative.kafka.event", "dev.knative.rabbitmq.event"}

const ruleArrivalType = `must be "` + Type + `", or what Knative's Kafka and RabbitMQ sources make of a plain message`

func (v *envelope) arrival() (Arrival, error) {
	source, id, typ, err := v.identity()
	if err != nil {
		return Arrival{}, err
	}
	data, err := v.payload()
	if err != nil {
		return Arrival{}, err
	}
	return newArrival(source, id, typ, data)
}

func newArrival(source, id, typ string, data []byte) (Arrival, error) {
	if err := checkIdentity(source, id); err != nil {
		return Arrival{}, err
	}
	if typ != Type && !slices.Contains(wrappers, typ) {
		return Arrival{}, violation("type", quote(typ), ruleArrivalType)
	}
	if len(data) == 0 {
		return Arrival{}, violation("data", nil, ruleData)
	}
	r, err := ParseReport(data)
	return Arrival{source, id, r}, err
}

// ParseArrivals reads a CloudEvents batch for a writer; its errors are ParseBatch's and ParseReport's.
func ParseArrivals(data []byte) ([]Arrival, error) {
	var all []Arrival
	var v envelope
	err := each(data, "CloudEvents batch", ruleBatch, func(d *decoder, _ int) error {
		if err := d.envelope(data, &v); err != nil {
			return err
		}
		a, err := v.arrival()
		all = append(all, a)
		return err
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// ParseArrival reads one CloudEvent for a writer; its errors are Parse's and ParseReport's.
func ParseArrival(e *event.Event) (Arrival, error) {
	return newArrival(e.Source(), e.ID(), e.Type(), e.DataEncoded)
}
