// Finds where documents begin in a sample, for document masks: position ids that count from 0 in
// every document, and the starts of the documents (cu_seqlens without its last entry).
// llm/data/samples/documents.py computes the same numbers.
#pragma once

#include <cstdint>

#include "core/packing.h"

namespace ingot {

// A sample cut from the stream: its T inputs lie in `row`, ids of `item_size` (1, 2, 4, 8) bytes and
// aligned to that. The token `eod` ends its document, or begins it (eod_first); what the row begins
// in the middle of counts as a document too. Writes position_ids[0..T) and the starts, `base` added
// to each; there are at most T, `base` the first. Returns how many. std::invalid_argument on sizes
// that do not fit.
int64_t scan_documents(const void* row, int item_size, int64_t T, uint32_t eod, bool eod_first,
                       int32_t base, int32_t* position_ids, int32_t* starts);

// A packed sample of T + 1 slots: n >= 1 pieces one after another from slot 0, then padding, which
// is a document of its own. Writes position_ids[0..T), the starts as above (at most T, of pieces
// and padding that begin at an input), and counted[0..T): target t, in slot t + 1, is 0 where the
// slot begins a piece or is padding, else 1. Returns the number of starts.
// std::invalid_argument when the pieces are empty or do not fit.
int64_t lay_out_pieces(const Piece* pieces, int64_t n, int64_t T, int32_t base,
                       int32_t* position_ids, int32_t* starts, unsigned char* counted);

// Writes `eod` to tokens [used, width) of a row.
void pad_row(void* row, int item_size, int64_t used, int64_t width, uint32_t eod);

}  // namespace ingot
