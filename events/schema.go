package events

import (
	_ "embed"
)

// Schema is the JSON Schema (2020-12) of a report: the same rules as ParseReport's. JSON Schema counts characters and not
// bytes, so the limits in bytes stand in a keyword of our own, maxBytes, beside maxLength; a validator that does not know
// it takes a text that is within the limit in characters but not in bytes.
//
//go:generate go test -run TestSchemaListsTheCountries -args -write
//go:embed report.schema.json
var Schema []byte
