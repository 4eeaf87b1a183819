package link

import (
	"encoding/binary"
	"errors"
)

// value is one encoded AMQP value (AMQP 1.0, part 1): a constructor and what follows it.
type value struct {
	code byte
	body []byte // of a variable width value without its size, of a list with its count
}

// The constructors that are told apart; all others only have a width, which is in the upper half of the code.
const (
	codeDescribed  = 0x00
	codeNull       = 0x40
	codeTrue       = 0x41
	codeFalse      = 0x42
	codeUint0      = 0x43
	codeUlong0     = 0x44
	codeList0      = 0x45
	codeUbyte      = 0x50
	codeSmallUint  = 0x52
	codeSmallUlong = 0x53
	codeBoolean    = 0x56
	codeUint       = 0x70
	codeUlong      = 0x80
	codeBinary8    = 0xa0
	codeString8    = 0xa1
	codeSymbol8    = 0xa3
	codeBinary32   = 0xb0
	codeString32   = 0xb1
	codeSymbol32   = 0xb3
	codeList8      = 0xc0
	codeList32     = 0xd0
)

var errValue = errors.New("not a well-formed AMQP value")

// reader takes values off the front of b. After an error it has none left.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail() value {
	r.b, r.err = nil, errValue
	return value{code: codeNull}
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.fail()
		return nil
	}
	taken := r.b[:n:n]
	r.b = r.b[n:]
	return taken
}

// next takes one value. Of a described one it has the constructor only: next then takes descriptor and value.
func (r *reader) next() value {
	head := r.take(1)
	if head == nil {
		return r.fail()
	}
	v := value{code: head[0]}
	width := 0
	switch v.code >> 4 {
	case 0x0:
		if v.code != codeDescribed {
			return r.fail()
		}
		return v
	case 0x4:
	case 0x5:
		width = 1
	case 0x6:
		width = 2
	case 0x7:
		width = 4
	case 0x8:
		width = 8
	case 0x9:
		width = 16
	case 0xa, 0xc, 0xe:
		if size := r.take(1); size != nil {
			width = int(size[0])
		}
	case 0xb, 0xd, 0xf:
		if size := r.take(4); size != nil {
			width = int(binary.BigEndian.Uint32(size))
		}
	default:
		return r.fail()
	}
	v.body = r.take(width)
	if r.err != nil {
		return r.fail()
	}
	return v
}

// described takes a described value; its descriptor is 0 if it is not a number.
func (r *reader) described() (descriptor uint64, v value) {
	if r.next().code != codeDescribed {
		return 0, r.fail()
	}
	d := r.next()
	v = r.next()
	if d.code == codeDescribed || v.code == codeDescribed { // allowed by the encoding, used by nobody
		return 0, r.fail()
	}
	return d.uint(), v
}

// fields returns the items of a list, at most as many as wanted; those that are left out are null.
func (v value) fields(wanted []value) error {
	for i := range wanted {
		wanted[i] = value{code: codeNull}
	}
	var count int
	r := reader{b: v.body}
	switch v.code {
	case codeList0:
		return nil
	case codeList8:
		if b := r.take(1); b != nil {
			count = int(b[0])
		}
	case codeList32:
		if b := r.take(4); b != nil {
			count = int(binary.BigEndian.Uint32(b))
		}
	default:
		return errValue
	}
	for i := 0; i < count && i < len(wanted) && r.err == nil; i++ {
		wanted[i] = r.item()
	}
	return r.err
}

// item takes one value; of a described one, what is described.
func (r *reader) item() value {
	v := r.next()
	if v.code == codeDescribed {
		r.next()
		v = r.next()
		if v.code == codeDescribed {
			return r.fail()
		}
		v.code, v.body = codeNull, nil // nothing that is described is of interest inside a list, but for errors
	}
	return v
}

// uint returns a number that is not negative; 0 for anything else.
func (v value) uint() uint64 {
	switch v.code {
	case codeSmallUint, codeSmallUlong, codeUbyte:
		return uint64(v.body[0])
	case codeUint:
		return uint64(binary.BigEndian.Uint32(v.body))
	case codeUlong:
		return binary.BigEndian.Uint64(v.body)
	}
	return 0
}

func (v value) is() bool { return v.code == codeTrue || v.code == codeBoolean && v.body[0] == 1 }

func (v value) null() bool { return v.code == codeNull }

// text returns a string's, a symbol's or a binary's bytes.
func (v value) text() []byte {
	switch v.code {
	case codeString8, codeString32, codeSymbol8, codeSymbol32, codeBinary8, codeBinary32:
		return v.body
	}
	return nil
}

// The rest writes values. Sizes are always written in four bytes, but for short strings and symbols.

func appendUint(b []byte, n uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, codeUint), n)
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(append(b, codeString32), uint32(len(s))), s...)
}

func appendSymbol(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(append(b, codeSymbol32), uint32(len(s))), s...)
}

func appendBinary(b, data []byte) []byte {
	return append(binary.BigEndian.AppendUint32(append(b, codeBinary32), uint32(len(data))), data...)
}

// appendList appends a described list, whose items add appends.
func appendList(b []byte, descriptor byte, count int, add func(b []byte) []byte) []byte {
	b = append(b, codeDescribed, codeSmallUlong, descriptor, codeList32)
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(count))
	b = add(b)
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	return b
}
