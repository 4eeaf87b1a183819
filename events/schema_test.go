package events

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
)

var write = flag.Bool("write", false, "write report.schema.json")

// schemaText is report.schema.json with the countries that the code knows.
func schemaText() string {
	var codes []string
	for _, code := range slices.Sorted(maps.Keys(countries)) {
		var anyCase strings.Builder
		for _, c := range code {
			fmt.Fprintf(&anyCase, "[%c%c]", c, c-'A'+'a')
		}
		codes = append(codes, anyCase.String())
	}
	return `{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "$id": "https://isobar.dev/report.schema.json",
  "title": "Weather report",
  "description": "maxBytes, a keyword of our own, bounds a string in bytes of UTF-8, where maxLength counts characters.",
  "type": "object",
  "required": ["country", "weather"],
  "properties": {
    "description": {"type": "string", "maxLength": 1024, "maxBytes": 1024},
    "country": {
      "description": "ISO 3166-1 alpha-2 or alpha-3, in any case",
      "type": "string",
      "pattern": "^(?:` + strings.Join(codes, "|") + `)$"
    },
    "weather": {"type": "string", "minLength": 1, "maxLength": 64, "maxBytes": 64}
  },
  "examples": [{"description": "Test", "country": "GT", "weather": "Sunny"}]
}
`
}

func TestSchemaListsTheCountries(t *testing.T) {
	if *write {
		if err := os.WriteFile("report.schema.json", []byte(schemaText()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if string(Schema) != schemaText() {
		t.Error("report.schema.json is not what the code says: go generate ./events")
	}
}

// maxBytes makes the validator know our keyword.
type maxBytes int

func (limit maxBytes) Validate(ctx *jsonschema.ValidatorContext, value any) {
	if text, ok := value.(string); ok && len(text) > int(limit) {
		ctx.AddError(&kind.MaxLength{Got: len(text), Want: int(limit)})
	}
}

func schema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema))
	if err != nil {
		t.Fatal(err)
	}
	const id = "https://isobar.dev/report.schema.json"
	c := jsonschema.NewCompiler()
	c.AssertVocabs()
	c.RegisterVocabulary(&jsonschema.Vocabulary{
		URL: "https://isobar.dev/vocabulary",
		Compile: func(_ *jsonschema.CompilerContext, object map[string]any) (jsonschema.SchemaExt, error) {
			n, ok := object["maxBytes"].(json.Number)
			if !ok {
				return nil, nil
			}
			limit, err := n.Int64()
			return maxBytes(limit), err
		},
	})
	if err := c.AddResource(id, document); err != nil {
		t.Fatal(err)
	}
	compiled, err := c.Compile(id)
	if err != nil {
		t.Fatal(err)
	}
	return compiled
}

// reportCases are the rules of a report. Each is put to the code and, where it is JSON at all, to the schema.
var reportCases = []struct {
	name, json string
	field      string // of the broken rule; "-" where the JSON itself is broken, "" where the report is good
	whole      bool   // the broken rule is of the report as a whole
	want       Report
}{
	{name: "the report of the README", json: `{"description":"Test","country":"GT","weather":"Sunny"}`, want: Report{"Test", "GT", "Sunny"}},
	{name: "an alpha-3 code is counted as it was sent", json: `{"country":"ESP","weather":"Rain"}`, want: Report{"", "ESP", "Rain"}},
	{name: "a country in lower case becomes upper case", json: `{"country":"gt","weather":"Rain"}`, want: Report{"", "GT", "Rain"}},
	{name: "a country in mixed case becomes upper case", json: `{"country":"eSp","weather":"Rain"}`, want: Report{"", "ESP", "Rain"}},
	{name: "unknown fields are ignored", json: `{"x":{"country":[1]},"country":"GT","weather":"Rain","y":null}`, want: Report{"", "GT", "Rain"}},
	{name: "escapes are read", json: `{"\u0063ountry":"\u0047T","weather":"\u2600\ufe0f \"x\""}`, want: Report{"", "GT", "☀️ \"x\""}},
	{name: "weather of 64 bytes", json: `{"country":"GT","weather":"` + strings.Repeat("x", 64) + `"}`, want: Report{"", "GT", strings.Repeat("x", 64)}},
	{name: "weather of 64 bytes in 32 characters", json: `{"country":"GT","weather":"` + strings.Repeat("é", 32) + `"}`, want: Report{"", "GT", strings.Repeat("é", 32)}},
	{name: "description of 1 KiB", json: `{"country":"GT","weather":"x","description":"` + strings.Repeat("d", 1024) + `"}`, want: Report{strings.Repeat("d", 1024), "GT", "x"}},
	{name: "an empty description", json: `{"country":"GT","weather":"x","description":""}`, want: Report{"", "GT", "x"}},
	{name: "white space around it all", json: " \t\r\n{ \"country\" : \"GT\" , \"weather\" : \"x\" } \n", want: Report{"", "GT", "x"}},

	{name: "no country", json: `{"weather":"Sunny"}`, field: "country"},
	{name: "no weather", json: `{"country":"GT"}`, field: "weather"},
	{name: "nothing at all", json: `{}`, field: "country"},
	{name: "names are case-sensitive", json: `{"Country":"GT","weather":"Sunny"}`, field: "country"},
	{name: "a country that is none", json: `{"country":"XX","weather":"Sunny"}`, field: "country"},
	{name: "a country by name", json: `{"country":"Guatemala","weather":"Sunny"}`, field: "country"},
	{name: "a country by number", json: `{"country":"320","weather":"Sunny"}`, field: "country"},
	{name: "a reserved code that is no country's", json: `{"country":"EU","weather":"Sunny"}`, field: "country"},
	{name: "a country with a blank", json: `{"country":"GT ","weather":"Sunny"}`, field: "country"},
	{name: "a country in look-alike letters", json: `{"country":"ＧＴ","weather":"Sunny"}`, field: "country"},
	{name: "a dotless i is no I", json: `{"country":"ıt","weather":"Sunny"}`, field: "country"},
	{name: "an empty country", json: `{"country":"","weather":"Sunny"}`, field: "country"},
	{name: "a country that is null", json: `{"country":null,"weather":"Sunny"}`, field: "country"},
	{name: "a country that is a number", json: `{"country":320,"weather":"Sunny"}`, field: "country"},
	{name: "a country that is an array", json: `{"country":["GT"],"weather":"Sunny"}`, field: "country"},
	{name: "an empty weather", json: `{"country":"GT","weather":""}`, field: "weather"},
	{name: "weather of 65 bytes", json: `{"country":"GT","weather":"` + strings.Repeat("x", 65) + `"}`, field: "weather"},
	{name: "weather of 66 bytes in 33 characters", json: `{"country":"GT","weather":"` + strings.Repeat("é", 33) + `"}`, field: "weather"},
	{name: "weather that is null", json: `{"country":"GT","weather":null}`, field: "weather"},
	{name: "weather that is an object", json: `{"country":"GT","weather":{"sun":1}}`, field: "weather"},
	{name: "description of 1 KiB and a byte", json: `{"country":"GT","weather":"x","description":"` + strings.Repeat("d", 1025) + `"}`, field: "description"},
	{name: "a description that is a boolean", json: `{"country":"GT","weather":"x","description":true}`, field: "description"},
	{name: "a description that is null", json: `{"country":"GT","weather":"x","description":null}`, field: "description"},
	{name: "a string", json: `"GT"`, whole: true},
	{name: "a number", json: `7`, whole: true},
	{name: "null", json: `null`, whole: true},
	{name: "an array", json: `[{"country":"GT","weather":"Sunny"}]`, whole: true},

	{name: "an empty body", json: ``, field: "-"},
	{name: "only white space", json: ` `, field: "-"},
	{name: "an object that does not end", json: `{"country":"GT","weather":"Sunny"`, field: "-"},
	{name: "a string that does not end", json: `{"country":"GT`, field: "-"},
	{name: "no quotes", json: `{country:GT}`, field: "-"},
	{name: "single quotes", json: `{'country':'GT','weather':'x'}`, field: "-"},
	{name: "a comma too many", json: `{"country":"GT","weather":"x",}`, field: "-"},
	{name: "a comment", json: `{"country":"GT","weather":"x"} // hm`, field: "-"},
	{name: "two reports", json: `{"country":"GT","weather":"x"}{"country":"GT","weather":"x"}`, field: "-"},
	{name: "a raw newline in a string", json: "{\"country\":\"GT\",\"weather\":\"a\nb\"}", field: "-"},
	{name: "half of a surrogate pair", json: `{"country":"GT","weather":"\ud83c"}`, field: "-"},
	{name: "broken UTF-8", json: "{\"country\":\"GT\",\"weather\":\"\xff\"}", field: "-"},
	{name: "broken JSON is said before a broken rule", json: `{"country":"XX","weather":"x"`, field: "-"},
}

func TestReport(t *testing.T) {
	valid := schema(t)
	for _, c := range reportCases {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseReport([]byte(c.json))
			switch violation, broken := errors.AsType[*Violation](err); {
			case c.field == "-":
				if _, malformed := errors.AsType[*Malformed](err); !malformed {
					t.Fatalf("the error is %v, not that the JSON is broken", err)
				}
				return
			case c.whole || c.field != "":
				if !broken || violation.Field != c.field {
					t.Fatalf("the error is %v, not of the field %q", err, c.field)
				}
			case err != nil:
				t.Fatal(err)
			case got != c.want:
				t.Fatalf("read as %+v", got)
			}
			document, jsonErr := jsonschema.UnmarshalJSON(strings.NewReader(c.json))
			if jsonErr != nil {
				t.Fatal(jsonErr)
			}
			if schemaErr := valid.Validate(document); (schemaErr == nil) != (err == nil) {
				t.Errorf("the code says %v, the schema %v", err, schemaErr)
			}
			if err == nil {
				again, err := ParseReport(got.AppendJSON(nil))
				if err != nil || again != got {
					t.Errorf("written and read again it is %+v, %v", again, err)
				}
			}
		})
	}
	t.Run("a name that stands twice", func(t *testing.T) { // JSON Schema never sees it
		if _, err := ParseReport([]byte(`{"country":"GT","country":"ES","weather":"x"}`)); err == nil {
			t.Error("is taken")
		}
	})
}

func TestCountryCodes(t *testing.T) {
	if len(countries) != 2*249 {
		t.Errorf("%d codes, where ISO 3166-1 has 249 countries with two each", len(countries))
	}
	form := regexp.MustCompile(`^[A-Z]{2,3}$`)
	for code := range countries {
		if !form.MatchString(code) {
			t.Errorf("code %q", code)
		}
	}
}

func FuzzReport(f *testing.F) {
	for _, c := range reportCases {
		f.Add([]byte(c.json))
	}
	valid := schema(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseReport(data)
		if _, malformed := errors.AsType[*Malformed](err); malformed {
			return
		}
		document, jsonErr := jsonschema.UnmarshalJSON(bytes.NewReader(data))
		if jsonErr != nil {
			t.Fatalf("%q is read as %+v, %v, but is no JSON: %v", data, r, err, jsonErr)
		}
		if schemaErr := valid.Validate(document); (schemaErr == nil) != (err == nil) {
			t.Errorf("of %q the code says %v, the schema %v", data, err, schemaErr)
		}
		if err == nil {
			if again, err := ParseReport(r.AppendJSON(nil)); err != nil || again != r {
				t.Errorf("%q written and read again is %+v, %v", data, again, err)
			}
		}
	})
}
