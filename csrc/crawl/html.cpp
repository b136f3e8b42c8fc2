// What a page would cost the HTML parser: its time grows with the square of some kinds of nesting.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ingot {
namespace {

// Elements that the parser opens anew in each later block where they were left open.
constexpr std::string_view kFormatting[] = {"b", "big", "code", "em", "font", "i", "s", "small", "strike", "strong", "tt", "u"};
// Elements that are looked at again for each that is opened in them: by the parser, or to find the main content.
constexpr std::string_view kBlocks[] = {"article", "div", "optgroup"};
// Elements that no end tag of another kind goes beyond: always, or unless it is of the second kind itself.
constexpr std::string_view kFences[] = {"applet", "marquee", "object", "table", "template"};
constexpr std::string_view kCells[] = {"caption", "tbody", "td", "tfoot", "th", "thead", "tr"};
// Elements that are never open for long: they have no end tag, or the next of their kind ends them.
constexpr std::string_view kLeaves[] = {"br", "dd", "dt", "embed", "hr", "img", "input", "li", "link", "meta", "option", "p", "source", "wbr"};
// More visits than any page is worth: the count ends there, since it takes the square of the nesting itself.
constexpr std::uint64_t kEnough = 100'000'000;

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }
bool is_letter(char c) { return lower(c) >= 'a' && lower(c) <= 'z'; }

template <std::size_t n>
bool among(std::string_view name, const std::string_view (&names)[n]) {
  for (std::string_view one : names) {
    if (name == one) return true;
  }
  return false;
}

class Scan {
 public:
  explicit Scan(std::string_view html) : html_(html) {}

  // Elements that the parser makes, at most; and steps that it and the search for the main content take.
  std::pair<std::uint64_t, std::uint64_t> run() {
    while (visits_ < kEnough && (at_ = html_.find('<', at_)) < html_.size()) {
      const char next = peek(1);
      const bool is_end = next == '/' && is_letter(peek(2));
      if (is_end || is_letter(next)) {
        at_ += 1 + is_end;
        tag(is_end);
      } else if (html_.compare(at_, 4, "<!--") == 0) {
        at_ = html_.find("-->", at_ + 2);
      } else {
        ++at_;
      }
    }
    return {nodes_, visits_};
  }

 private:
  struct Open {
    std::uint64_t name;  // its characters, which are quick to compare
    bool is_block, is_fence, is_cell;
  };

  char peek(std::size_t ahead) const { return at_ + ahead < html_.size() ? html_[at_ + ahead] : '\0'; }

  void tag(bool is_end) {
    std::string name;
    for (; at_ < html_.size() && !is_space(html_[at_]) && html_[at_] != '/' && html_[at_] != '>'; ++at_) {
      if (name.size() < 8) name += lower(html_[at_]);  // longer than any name that matters
    }
    const std::uint64_t attributes = skip_attributes();
    const bool is_formatting = among(name, kFormatting);
    Open tag{0, among(name, kBlocks), among(name, kFences), among(name, kCells)};
    std::memcpy(&tag.name, name.data(), name.size());
    if (is_end) {
      formatting_ -= is_formatting && formatting_ > 0;
      return close(tag);
    }
    nodes_ += 1 + formatting_;
    visits_ += 1 + blocks_ + attributes * attributes / 16;  // each is compared with those before, which is quick
    formatting_ += is_formatting;
    blocks_ += tag.is_block;
    if (!among(name, kLeaves)) open_.push_back(tag);
    if (name == "script" || name == "style") skip_raw("</" + name);
  }

  // The parser goes from the last open element to the one that ends here, which ends those in between too.
  void close(const Open& tag) {
    std::uint64_t blocks = 0;
    for (std::size_t at = open_.size(); at > 0;) {
      const Open& one = open_[--at];
      blocks += one.is_block;
      const bool found = one.name == tag.name;
      if (!found && !one.is_fence && (!one.is_cell || tag.is_cell || tag.is_fence) && at > 0) continue;
      visits_ += (open_.size() - at) / 8;  // a step takes less time than a visit
      if (found) blocks_ -= blocks, open_.resize(at);
      return;
    }
  }

  // Go past the tag's end; how many attributes it has.
  std::uint64_t skip_attributes() {
    std::uint64_t count = 0;
    while (true) {
      while (at_ < html_.size() && (is_space(html_[at_]) || html_[at_] == '/')) ++at_;
      if (at_ >= html_.size() || html_[at_++] == '>') return count;
      ++count;
      at_ = html_.find_first_of(" \t\n\f\r/>=", at_);
      while (at_ < html_.size() && is_space(html_[at_])) ++at_;
      if (at_ >= html_.size() || html_[at_] != '=') continue;
      do ++at_; while (at_ < html_.size() && is_space(html_[at_]));
      const char quote = peek(0);
      const bool quoted = quote == '"' || quote == '\'';
      at_ = quoted ? html_.find(quote, at_ + 1) : html_.find_first_of(" \t\n\f\r>", at_);
      at_ += quoted && at_ < html_.size();
    }
  }

  // Go past what is no markup, to the end tag; to the end where there is none.
  void skip_raw(const std::string& end) {
    while ((at_ = html_.find("</", at_)) < html_.size()) {
      std::size_t i = 2;
      while (i < end.size() && lower(peek(i)) == end[i]) ++i;
      if (i == end.size()) return;
      at_ += 2;
    }
  }

  std::string_view html_;
  std::size_t at_ = 0;
  std::uint64_t nodes_ = 0, visits_ = 0, formatting_ = 0, blocks_ = 0;
  std::vector<Open> open_;
};

}  // namespace

void bind_html(pybind11::module_& module) {
  module.def("html_cost", [](std::string_view html) { return Scan(html).run(); }, pybind11::arg("html"));
}

}  // namespace ingot
