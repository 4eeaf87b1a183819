// Package events defines what travels through Isobar: the weather report, the rules it obeys, the CloudEvent that
// carries it, and how that is read from and written to JSON, HTTP requests, Kafka records and AMQP messages.
package events

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/go-json-experiment/json/jsontext"
)

// Limits of a report, in bytes of UTF-8.
const (
	MaxWeather     = 64
	MaxDescription = 1024
)

// Report is one weather report that obeys the rules: Country is an upper-case ISO 3166-1 alpha-2 or alpha-3 code,
// Weather has 1 to MaxWeather bytes and Description 0 to MaxDescription.
type Report struct {
	Description string `json:"description,omitempty"`
	Country     string `json:"country"`
	Weather     string `json:"weather"`
}

// Malformed is the error for what cannot be read at all: broken JSON, or an envelope that is no CloudEvent.
type Malformed struct {
	What string // what was being read
	Why  string
}

func (e *Malformed) Error() string { return e.What + ": " + e.Why }

// Violation is the error for what can be read but breaks a rule.
type Violation struct {
	Field string // the field or attribute, as the sender wrote it; empty for the report as a whole
	Value string // its value as JSON, cut to 100 bytes; empty if the field is missing
	Rule  string // what is right
}

func (e *Violation) Error() string {
	var b strings.Builder
	if e.Field != "" {
		b.WriteString(e.Field + " ")
	}
	b.WriteString(e.Rule)
	if e.Value != "" {
		b.WriteString(", not " + e.Value)
	}
	return b.String()
}

func violation(field string, value []byte, rule string) error {
	const most = 100
	shown := string(bytes.ToValidUTF8(value, []byte("\uFFFD")))
	if len(shown) > most {
		shown = strings.ToValidUTF8(shown[:most], "") + "…"
	}
	return &Violation{Field: field, Value: shown, Rule: rule}
}

// The rules, as a sender is told them.
const (
	ruleReport      = "a report must be a JSON object like " + `{"description":"Test","country":"GT","weather":"Sunny"}`
	ruleCountry     = "must be an ISO 3166-1 alpha-2 or alpha-3 code, like GT or ESP"
	ruleWeather     = "must be a string of 1 to 64 bytes"
	ruleDescription = "must be a string of at most 1024 bytes"
)

// ParseReport reads a report from JSON (RFC 8259; a name that stands twice in an object is an error). Unknown fields
// are ignored. The error is a *Malformed or a *Violation.
func ParseReport(data []byte) (Report, error) {
	d := decode(data)
	defer d.free()
	r, err := d.report()
	if err = d.ended(err); err != nil {
		return Report{}, d.wrap("report", err)
	}
	return r, nil
}

// AppendJSON appends the report as JSON.
func (r Report) AppendJSON(b []byte) []byte {
	b = append(b, '{')
	if r.Description != "" {
		b = append(b, `"description":`...)
		b = appendString(b, r.Description)
		b = append(b, ',')
	}
	b = append(b, `"country":"`...)
	b = append(b, r.Country...)
	b = append(b, `","weather":`...)
	b = appendString(b, r.Weather)
	return append(b, '}')
}

// appendString appends s as a JSON string; what is not UTF-8 in it becomes U+FFFD.
func appendString(b []byte, s string) []byte {
	b, _ = jsontext.AppendQuote(b, s) // its only error is of what it has replaced
	return b
}

// decoder reads JSON strictly; decoders are pooled, since every event at every hop needs one.
type decoder struct {
	*jsontext.Decoder
	buf *bytes.Buffer
}

var decoders = sync.Pool{New: func() any {
	buf := new(bytes.Buffer)
	return &decoder{jsontext.NewDecoder(buf), buf}
}}

func decode(data []byte) *decoder {
	d := decoders.Get().(*decoder)
	*d.buf = *bytes.NewBuffer(data)
	d.Reset(d.buf)
	return d
}

func (d *decoder) free() {
	*d.buf = bytes.Buffer{}
	d.Reset(d.buf)
	decoders.Put(d)
}

// end reports what follows the value that has been read.
func (d *decoder) end() error {
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		if err == nil {
			err = fmt.Errorf("more follows after the end at byte %d", d.InputOffset())
		}
		return err
	}
	return nil
}

// ended is err, unless what was read is not all that there is: broken JSON is said before a broken rule.
func (d *decoder) ended(err error) error {
	if _, broken := errors.AsType[*Violation](err); err != nil && !broken {
		return err
	}
	if more := d.end(); more != nil {
		return more
	}
	return err
}

// wrap makes an error of the JSON reader a *Malformed; a *Violation stays what it is.
func (d *decoder) wrap(what string, err error) error {
	if _, ok := errors.AsType[*Violation](err); ok {
		return err
	}
	if _, ok := errors.AsType[*Malformed](err); ok {
		return err
	}
	if errors.Is(err, io.EOF) {
		return &Malformed{what, "the JSON is empty"}
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return &Malformed{what, "the JSON ends too early"}
	}
	return &Malformed{what, strings.TrimPrefix(err.Error(), "jsontext: ")}
}

// text reads a JSON string, or answers with the rule for any other value.
func (d *decoder) text(field, rule string) (string, error) {
	if d.PeekKind() != '"' {
		value, err := d.ReadValue()
		if err != nil {
			return "", err
		}
		return "", violation(field, value, rule)
	}
	token, err := d.ReadToken()
	if err != nil {
		return "", err
	}
	return token.String(), nil
}

// name reads the name of an object's member, in quotes and with no more escapes than it needs.
func (d *decoder) name() ([]byte, error) {
	name, err := d.ReadValue()
	if err == nil && bytes.IndexByte(name, '\\') >= 0 {
		name = appendString(nil, unquote(name))
	}
	return name, err
}

func (d *decoder) report() (Report, error) {
	var r Report
	if kind := d.PeekKind(); kind != '{' {
		value, err := d.ReadValue()
		if err != nil {
			return r, err
		}
		return r, violation("", value, ruleReport)
	}
	if _, err := d.ReadToken(); err != nil {
		return r, err
	}
	// The first broken rule is kept until the object is read to its end: broken JSON is said before a broken rule.
	var broken error
	var hasCountry, hasWeather bool
	for d.PeekKind() != '}' {
		name, err := d.name()
		if err != nil {
			return r, err
		}
		var text string
		switch string(name) {
		case `"country"`:
			hasCountry = true
			if text, err = d.text("country", ruleCountry); err == nil {
				code, ok := country(text)
				if !ok {
					err = violation("country", quote(text), ruleCountry)
				}
				r.Country = code
			}
		case `"weather"`:
			hasWeather = true
			if text, err = d.text("weather", ruleWeather); err == nil && (text == "" || len(text) > MaxWeather) {
				err = violation("weather", quote(text), ruleWeather)
			}
			r.Weather = text
		case `"description"`:
			if text, err = d.text("description", ruleDescription); err == nil && len(text) > MaxDescription {
				err = violation("description", quote(text), ruleDescription)
			}
			r.Description = text
		default:
			err = d.SkipValue()
		}
		if err != nil {
			if _, ok := errors.AsType[*Violation](err); !ok {
				return r, err
			}
			if broken == nil {
				broken = err
			}
		}
	}
	if _, err := d.ReadToken(); err != nil {
		return r, err
	}
	switch {
	case broken != nil:
		return r, broken
	case !hasCountry:
		return r, violation("country", nil, "is missing: it "+ruleCountry)
	case !hasWeather:
		return r, violation("weather", nil, "is missing: it "+ruleWeather)
	}
	return r, nil
}

func quote(s string) []byte { return strconv.AppendQuote(nil, s) }
