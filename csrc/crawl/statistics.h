// What the rules of filters need to know of a text.
#pragma once

#include "crawl/words.h"
