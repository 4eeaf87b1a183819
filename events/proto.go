package events

import (
	"net/url"
	"strings"

	pbformat "github.com/cloudevents/sdk-go/binding/format/protobuf/v2"
	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// The protobuf format is the SDK's. What every report has goes a shorter way to the same message: every report passes
// here twice.

// jsonAttribute is shared by all messages: nobody writes to it.
var jsonAttribute = textAttribute(jsonMediaType)

func textAttribute(text string) *pb.CloudEventAttributeValue {
	return &pb.CloudEventAttributeValue{Attr: &pb.CloudEventAttributeValue_CeString{CeString: text}}
}

// ToProto returns the event in CloudEvents' protobuf format. The message shares the event's data.
func ToProto(e *event.Event) (*pb.CloudEvent, error) {
	ctx, ok := e.Context.(*event.EventContextV1)
	if !ok || ctx.DataSchema != nil {
		return pbformat.ToProto(e)
	}
	attributes := make(map[string]*pb.CloudEventAttributeValue, 4)
	for name, value := range ctx.Extensions {
		text, ok := value.(string)
		if !ok {
			return pbformat.ToProto(e)
		}
		attributes[name] = textAttribute(text)
	}
	if ctx.DataContentType != nil {
		if *ctx.DataContentType == jsonMediaType {
			attributes["datacontenttype"] = jsonAttribute
		} else {
			attributes["datacontenttype"] = textAttribute(*ctx.DataContentType)
		}
	}
	if ctx.Subject != nil {
		attributes["subject"] = textAttribute(*ctx.Subject)
	}
	if ctx.Time != nil {
		attributes["time"] = &pb.CloudEventAttributeValue{
			Attr: &pb.CloudEventAttributeValue_CeTimestamp{CeTimestamp: timestamppb.New(ctx.Time.Time)},
		}
	}
	return &pb.CloudEvent{
		Id:          ctx.ID,
		Source:      sourceOf(ctx),
		SpecVersion: event.CloudEventsVersionV1,
		Type:        ctx.Type,
		Attributes:  attributes,
		Data:        &pb.CloudEvent_BinaryData{BinaryData: e.DataEncoded},
	}, nil
}

// FromProto reads an event in CloudEvents' protobuf format, which must be a valid CloudEvent 1.0. The event shares the
// message's data.
func FromProto(m *pb.CloudEvent) (event.Event, error) {
	if e, ok := fromProto(m); ok {
		return e, nil
	}
	for name, value := range m.GetAttributes() {
		if value.GetAttr() == nil { // the SDK's reader fails on one
			return event.Event{}, &Malformed{"CloudEvent in protobuf", "the attribute " + name + " has no value"}
		}
		if _, ok := value.Attr.(*pb.CloudEventAttributeValue_CeTimestamp); !ok && name == "time" { // it would be the year 1
			return event.Event{}, &Malformed{"CloudEvent in protobuf", "the attribute time must be a timestamp"}
		}
	}
	if m.Id != strings.TrimSpace(m.Id) { // the SDK takes the white space away, and it would be another id
		return event.Event{}, violation("id", quote(m.Id), ruleID)
	}
	e, err := pbformat.FromProto(m)
	if err != nil {
		return event.Event{}, &Malformed{"CloudEvent in protobuf", err.Error()}
	}
	if err := e.Validate(); err != nil {
		return event.Event{}, &Malformed{"CloudEvent in protobuf", err.Error()}
	}
	if text, ok := m.Data.(*pb.CloudEvent_TextData); ok {
		e.DataEncoded = []byte(text.TextData) // it is the data; the SDK writes it as a JSON string
	}
	return *e, nil
}

// fromProto reads what ToProto writes the short way, and refuses everything else.
func fromProto(m *pb.CloudEvent) (event.Event, bool) {
	none := event.Event{}
	if m.GetSpecVersion() != event.CloudEventsVersionV1 || m.GetId() == "" || m.GetType() == "" {
		return none, false
	}
	data, ok := m.Data.(*pb.CloudEvent_BinaryData)
	if !ok {
		return none, false
	}
	ctx := &event.EventContextV1{ID: m.Id, Type: m.Type, Source: defaultSource}
	if m.Source != DefaultSource {
		u, err := url.Parse(m.Source)
		if err != nil || m.Source == "" {
			return none, false
		}
		ctx.Source = types.URIRef{URL: *u}
	}
	for name, value := range m.Attributes {
		switch attr := value.GetAttr().(type) {
		case *pb.CloudEventAttributeValue_CeString:
			switch name {
			case "subject":
				ctx.Subject = &attr.CeString
			case "datacontenttype":
				ctx.DataContentType = &attr.CeString
			case TraceParent, TraceState:
				if ctx.Extensions == nil {
					ctx.Extensions = make(map[string]any, 2)
				}
				ctx.Extensions[name] = attr.CeString
			default:
				return none, false
			}
		case *pb.CloudEventAttributeValue_CeTimestamp:
			if name != "time" || attr.CeTimestamp.CheckValid() != nil {
				return none, false
			}
			ctx.Time = &types.Timestamp{Time: attr.CeTimestamp.AsTime()}
		default:
			return none, false
		}
	}
	if ctx.Subject != nil && *ctx.Subject == "" || ctx.DataContentType != nil && *ctx.DataContentType != jsonMediaType {
		return none, false
	}
	return event.Event{Context: ctx, DataEncoded: data.BinaryData}, true
}

// sourceOf is ctx.Source.String() without writing the most frequent one anew.
func sourceOf(ctx *event.EventContextV1) string {
	if ctx.Source == defaultSource {
		return DefaultSource
	}
	return ctx.Source.String()
}
