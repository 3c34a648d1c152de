"""Word lists of the regex segmenter, all languages in one: abbreviations by what a full stop after them means.

Each was compared with CLDR's list for its language (common/segments), which does not say which abbreviations can end
a sentence. Words of which some language makes plain sentences (Danish "med", Spanish "es") stay out of the first list.
"""

from __future__ import annotations


def _words(*texts: str, **languages: str) -> frozenset[str]:
    return frozenset(" ".join([*texts, *languages.values()]).split())


def _abbreviations(english: str = "", **others: str) -> frozenset[str]:
    """Spellings of a list: English in any case, others not in capitals, where they are rather acronyms ("DNA")."""
    first, more = english.split(), " ".join(others.values()).split()
    return frozenset(
        [form for word in first for form in (word, word.capitalize(), word.title(), word.upper())]
        + [form for word in more for form in (word, word[:1].upper() + word[1:])]
    )


NEVER_LAST = _abbreviations(
    """
    mr mrs ms mx messrs mme mlle dr drs prof Sen rep reps Sens gov gen col Maj lt lieut capt cmdr sgt
    cpl pvt adm rev fr Hon pres supt insp Det amb mt ft vs v viz cf e.g i.e eg ie approx ca circa incl
    excl resp esp nr bzw vgl z.b d.h u.a hr frl sra srta dra mgr msgr ven atty asst assoc dist
    ed eds trans transl orig publ repr suppl al feat w.r.t a.k.a
    """,
    more="Apt Rm Bldg Pty Cdr Brig Ald Messrs",
    german="""
        hrn bspw insb insbes ggf ggfs evtl sog inkl exkl zzgl abzgl einschl dipl habil geb gest verh verw ehem
        eigtl urspr allg entspr dr.med dr.phil dr.jur dr.rer dr.ir rer.nat v.chr n.chr Tel Fa Fam Gebr
        """,
    french="mmes mlles MM Pr env av apr tél boul p.ex ndlr",
    spanish="""
        sr sres sras srtas dña dn lic licda ing gral cnel tte sgto mons excmo excma ilmo ilma rvdo hno hna Sto Sta
        ntra ntro avda dpto depto p.ej v.gr
        """,
    italian="Sig sigg dott dott.ssa prof.ssa avv geom Rag Arch cfr p.es",
    portuguese="exmo exma profa",
    dutch="bijv dhr mevr mw Ir Ds ds zgn oorspr",
    polish="np tzn tzw tj wg zob hab inż ks św bp abp gen płk ppłk mjr kpt tłum wyd zm ul im godz m.in",
    czech_slovak="např napr tzv mj resp popř příp MUDr JUDr RNDr PhDr PaedDr MVDr tř nám t.zn a.pod",
    south_slavic="npr odn oz gdč",
    romanian="dl dna bd sf șos",
    nordic="f.eks t.ex bl.a dvs pga mht ift jf ekskl vedr fr.o.m",
    finnish_estonian="esim ks vrt ns nk toht ts nt",
    hungarian="pl kb ún ifj özv vö ld",
    turkish="doç yrd sn bkz örn çev haz tğm alb müh",
    vietnamese="TP TS ThS PGS",
    indonesian="jl hj",
    baltic="pvz piem",
    cyrillic="""
        т.нар т.зв напр наприм див вж ср порів ім ул вул бул просп пер пл пос дер гр проф акад доц канд кап ред изд
        перев ок англ нем франц лат греч св преп инж зам нач
        """,
    greek="π.χ λ.χ κ κα κος δηλ βλ πρβλ αγ δρ λεωφ οδ πλ",
    indic="डॉ प्रो श्री पं कु एस एम एन एल एफ एच आर जे డా శ్రీ ಡಾ ಶ್ರೀ ഡോ ശ്രീ ડૉ ડો শ্রী ডা ড ডঃ திரு எம் எஸ் என் எல் ஆர்",
)
"""Something follows them within the sentence, whatever it looks like."""

BEFORE_NUMBER = _abbreviations(
    """
    no nos nr fig figs eq eqs eqn sec secs sect ch chap chs vol vols pp para paras art arts op ex pt pts
    app tab tbl prop thm def cor lem ln pl ref refs bk
    """,
    more="cl cls amend amends subsec subpt subch Dkt H.R exh",
    german="abs abb kap bd aufl anm ziff rn rdnr rz éd",
    romance="núm núms pág págs pag pagg artt capp séc alin pct chap",
    dutch="blz hfst afb",
    slavic="ust pkt poz rozdz rys čl odst ods písm obr č čís st",
    nordic_finnish="kl nro klo avd",
    cyrillic="рис мал табл стр стор гл ст пп тт кн кв корп оф",
    greek="αρ αριθ σελ τόμ κεφ εικ παρ",
)
"""No sentence ends between them and a number."""

PARTLY = _words(
    """
    Deut Josh Judg Sam Kgs Chron Neh Ps Pss Prov Eccl Isa Jer Lam Ezek Hos Mic Hab Zeph Hag Zech Mal Matt Rom Cor
    Gal Eph Phil Thess Tim Tit Philem Heb Jas Pet Pol
    """,
    other="lit mill mil med red cap est gem Gem ver",
)
"""Books of the Bible and the like: before small letters and numbers an abbreviation, else an ordinary word or name."""

LEGAL = _words(
    """
    Fed Civ Crim Evid App Cal Cong Stat Supp Reg Rul Rec Treas Const Cir Ct Bus Harv Colum Mich Stan Bankr Proc Prac
    Admin Educ Ins Pub Priv Sess Subch Div Bd Comm Res Nat
    """
)
"""Parts of a legal citation ("Fed. R. Civ. P. 12"): the sentence goes on before another part of one."""

DATES = _abbreviations(
    """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri
    """,
    other="""
        jän okt dez janv févr avr juil déc ene abr dic genn febbr ott mrt янв февр апр авг сент окт нояб дек
        січ лют бер трав черв жовт груд szept márc ápr máj jún júl
        """,
)

MAY_END = _abbreviations(
    """
    inc corp ltd co cos bros llc plc jr sr esq st ave blvd rd hwy sq univ dept govt intl natl ala ariz
    ark calif colo conn del fla ga ill ind kan kans ky la mass md mich minn miss mo mont neb nev okla
    ore penn pa tenn tex va vt wash wis wyo ont que mex ph.d m.d b.a m.a b.sc m.sc ll.b ll.m d.c a.d b.c
    """,
    more="ibid cit pkwy ctr bldg Eng",
    german="mio mrd Std sek jh jhdt jahrh hbf bhf str",
    romance="ltda cia cía cie ud uds vd vds máx mín aprox On",
    other="mln mld tys milj kr stk tlf csc drsc Bc Sb Av Şti Cad Sok Mah Ing sz",
    cyrillic="гг вв рр руб коп грн тыс тис млн млрд чел обл мин см км лв им ум род полк",
    greek="τηλ",
)
"""They end a sentence only before a word that opens one."""

BEFORE_CAPITAL = _abbreviations(
    "etc min max avg hrs hr lb lbs oz tbsp tsp km cm mm kg ml",
    other="""
        usw usf u.s.w ff ecc enz osv o.s.v m.m m.fl itd itp i.t.d atd apod aj ipd stb jne yms jms vb dll dsb dst ș.a.m.d
        т.д т.п т.ін др пр ін κλπ κ.λπ κτλ κ.τ.λ κ.ά
        """,
)
"""They end a sentence before a capital letter."""

TIMES = _abbreviations("a.m p.m")
TIME_ZONES = _words(
    """
    Eastern Central Mountain Pacific Greenwich London Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    January February March April May June July August September October November December local
    """
)
"""What belongs to a time of day, besides capitals ("8 p.m. EST")."""

SHORT_LAST = _words(
    """
    it me him her us you too so now up out in on off one two all yes no not do did go way day lol ok
    """
)
"""Short lower-case words that do end sentences, also where the next one opens in lower case."""

HEADINGS = _words(
    """
    chapter part section act scene book article lesson step table figure appendix volume canto
    sec. sect. art. fig. ch. kap. abb. §
    """
)

STARTERS = _words(
    """
    The A An This That These Those It He She They We You I His Her Its Their Our My Your There Here In
    On At By For From With Without To Of As If When While Where Who What Why How Which Whose Because
    Since Although Though Until After Before During However But And Or So Yet Then Thus Therefore Also
    Now Not No Yes Is Are Was Were Do Does Did Has Have Had Can Could Will Would Should May Might Must
    Let All Any Some Many Most Much More Few Each Every Both Another Other Others One Two Three Once
    Only Even Just Still Such Perhaps Maybe Please Thank Thanks Today Yesterday Tomorrow Later Soon
    Meanwhile Moreover Furthermore Nevertheless Nobody Nothing Everyone Everything Someone It's It’s I'm
    I’m He's He’s She's She’s They're They’re We're We’re That's That’s There's There’s Don't Don’t
    Didn't
    """
)
"""Capitalized words that open a sentence far more often than they are part of a name."""

OTHER_STARTERS = _words(
    german="""
        Er Sie Es Wir Ihr Ich Man Dies Diese Dieser Dieses Der Die Das Dem Den Ein Eine Dort Da Dann Danach Doch Aber
        Und Auch Auf Am Im Bei Nach Vor Mit Ohne Für Seit Wenn Als Weil Wer Was Wo Wie Warum Heute Morgen Gestern
        Niemand Jeder Alle Kein Keine Nicht Sein Seine Deshalb Dabei Damit Jetzt
        """,
    french="""
        Le La Les Un Une Ce Cet Cette Ces Il Elle Ils Elles On Nous Vous Je Tu Et Mais Donc Dans Sur Pour Par Avec Sans
        Selon Si Quand Qui Que Où Comment Pourquoi Personne Rien Tout C'est C’est Son Sa Ses
        """,
    spanish="""
        El Los Las Unos Unas Lo Este Esta Estos Estas Ese Esa Eso Esto Él Ella Ellos Ellas Yo Tú Nosotros Y Pero No En
        De Por Para Con Sin Según Cuando Quien Qué Cómo Nadie Nada Todo Todos Su Sus Se Me Te Es Son Fue Era Hay Allí
        Ahí Aquí Hoy Ayer También Además Después Luego Entonces
        """,
    italian="""
        Lo I Gli Uno Una È Questo Questa Quello Egli Lui Lei Loro Noi Voi Io E Ma Però Non Di Da Per Su Tra Quando
        Dove Chi Che Come Perché Nessuno Oggi Ieri
        """,
    portuguese="O Os As Um Uma Ele Ela Eles Elas Eu Nós Mas Não Em Na Do Sem Onde Quem Ninguém Hoje Isto Isso Foi",
    dutch="De Het Een Hij Zij Ze Wij Ik Je Dit Dat Deze Er En Maar Of Op Van Voor Met Daar Hier Nu Toen Wie Wat Waar",
    nordic="Han Hun Hon De Vi Jeg Jag Du Det Den Dette Detta Denne Och Og Men Hvis Om Når När På Til Till För Ingen Så",
    finnish_estonian="Hän Se Ne Tämä Nämä Minä Sinä Ja Mutta Jos Kun Siellä Täällä Nyt Sitten Kuka Mikä Ta Nad Aga",
    polish_czech="""
        Ten To Ona Oni Jest Są Był Była Było Nie W Z Po Dla Ale Gdy Jeśli Kto Co Jak Gdzie Tam Potem Wtedy Nikt Je
        Jsou Byl Byla Bylo Ne V Pro Když Kdo Kde Proč Pak Nikdo
        """,
    hungarian="Az Ő Ők Ez Azok Ezek És Ha Mert Amikor Ott Itt Most Majd Nem Van Volt Senki Mindenki",
    turkish="Bu Şu Bir Ben Sen Biz Siz Onlar Ama Fakat Ancak Ve Daha Sonra Böyle Çünkü Eğer Ne Kim Şimdi Bugün Herkes",
    romanian="Ea Ei Ele Este Și Dar Dacă În La Cu Un",
    russian="""
        Он Она Оно Они Это Этот Эта Эти Тот Те В На Но И А Да По Из За С К О Об От До У При Для Без Как Так Если Когда
        После Потом Тогда Там Тут Здесь Все Всё Его Ее Её Их Мы Вы Я Ты Не Нет Был Была Было Были Кто Что Где Почему
        Никто Ничего Теперь Сейчас Сегодня Вчера Однако Поэтому Также
        """,
    ukrainian_bulgarian="Він Вона Воно Вони Це Цей Ці Й З Як Коли Якщо Тоді Хто Що Де Той Тя То Те Това Този Тази Ако",
    greek="Ο Η Το Οι Τα Ένας Μια Ένα Αυτός Αυτή Αυτό Είναι Ήταν Και Αλλά Αν Όταν Στο Στη Με Για Από Σε Δεν Θα Να Εκεί",
)
"""The same in other languages. After one initial they are rather part of a name ("Ursula K. Le Guin")."""

ORDINAL_BEFORE = _words(
    german="der die das dem den des am im vom zum zur beim ab bis seit ein eine einen einem einer jeder jede jedes",
    other="az det",
)
"""A number with a full stop after one of them is an ordinal where such are written: "am 3. Oktober"."""

ORDINAL_AFTER = _words(
    """
    Januar Jänner Februar Feber März Mai Juni Juli Oktober Dezember Okt Dez Jahrhundert Jahrhunderts Jh Weltkrieg
    Weltkriegs Bundesliga Liga Klasse Platz Stock Auflage Etage FC FSV SV Jahrgang Lebensjahr Geburtstag Bezirk Senat
    Kammer Runde Obergeschoss OG Quartal Halbjahr Semester Sinfonie Jahrestag
    """
)
"""What German numbers in this way, months included, whatever stands before the number."""

ENGLISH_TOO = _words("April August September November Apr Aug Sept Nov")
"""Months that are English words too: ordinals only before a year ("3. August 2020")."""

WHOLE_SYLLABLES = _words("है हैं था थी थे हो हूँ हूं ही भी ना न छ छु তো না")
"""One syllable, but a word: in Indic scripts, other single syllables before a full stop are initials."""

NAMES_WITH_MARK = _words("yahoo jeopardy")
AFTER_COMMA = _words("Jr Sr Inc Ltd LLC Esq II III IV Ph M.D etc")
"""A comma before one of these joins it to a name and divides nothing."""
