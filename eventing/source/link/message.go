package link

// Sections is what Split finds in an encoded message.
type Sections struct {
	ID          string // the message-id, if it is a string
	ContentType []byte
	Data        []byte // the body, if it is one data section
	Body        bool   // whether the body is one data section
}

// The sections of a message, by descriptor (AMQP 1.0, part 3).
const (
	sectionHeader     = 0x70
	sectionProperties = 0x73
	sectionApp        = 0x74
	sectionData       = 0x75
	sectionFooter     = 0x78
)

// Split looks into an encoded message without decoding more of it than it returns, and without copying. The error says
// that the message is not well-formed; what was found before that is returned with it.
func Split(message []byte) (Sections, error) {
	var s Sections
	r := reader{b: message}
	bodies := 0
	for len(r.b) > 0 {
		descriptor, v := r.described()
		if r.err != nil {
			break
		}
		switch {
		case descriptor == sectionProperties:
			var fields [7]value
			if err := v.fields(fields[:]); err != nil {
				r.err = err
				break
			}
			if id := fields[0]; id.code == codeString8 || id.code == codeString32 {
				s.ID = string(id.body)
			}
			s.ContentType = fields[6].text()
		case descriptor == sectionData && (v.code == codeBinary8 || v.code == codeBinary32):
			s.Data = v.body
			bodies++
		case descriptor < sectionHeader || descriptor > sectionApp && descriptor < sectionFooter:
			bodies += 2 // another kind of body
		}
		if r.err != nil {
			break
		}
	}
	s.Body = bodies == 1 && r.err == nil
	return s, r.err
}
